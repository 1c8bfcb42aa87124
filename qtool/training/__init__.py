"""Gradients: quantized weights that learn, losses, and the loops that train them."""
