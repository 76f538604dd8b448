"""Wardround under stock Flower."""
