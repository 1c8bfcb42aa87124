"""Measures of speed and size."""
