"""Decoding token by token: static cache, few launches, one CUDA graph per step."""
