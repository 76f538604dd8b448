"""Readers, preprocessing and partition of hospital records."""
