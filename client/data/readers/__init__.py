"""One reader a format: what a hospital has, turned into client.data.encounters."""
