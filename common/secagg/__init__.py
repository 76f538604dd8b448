"""The arithmetic of secure aggregation."""
