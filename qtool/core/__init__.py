"""Pure functions on tensors: the mathematics of quantization. Imports torch and nothing heavier."""
