"""Execution of checkpoints: backends, modules, registration with transformers."""
