"""Execution of checkpoints: backends, modules, decoding."""
