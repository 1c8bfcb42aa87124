"""Quantizers: one method per file, the file's name is its name in recipes, constant METHOD."""
