"""The walk through the blocks of a model, and what is measured on it."""
