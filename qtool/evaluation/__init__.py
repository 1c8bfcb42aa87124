"""Measures of quality, each with the data set and settings that it holds for."""
