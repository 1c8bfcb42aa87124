"""Recipes: YAML that decides everything of a run but model, device and paths. Torch-free."""
