"""Quantized activations: symmetric integers times a step per token, or per tensor."""

import torch
from torch import Tensor

from qtool.scheme import ActivationScheme

SMALLEST_STEP = 1e-8
"""Of a token of zeros, whose codes are all zero."""


def step_sizes(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """Return the steps of activations (..., in_features): (..., 1) float32."""
    if scheme.scale is not None:
        return torch.full_like(x[..., :1], scheme.scale, dtype=torch.float32)
    largest = x.abs().amax(-1, keepdim=True).float()
    return (scheme.clip_ratio * largest / scheme.largest_code).clamp(min=SMALLEST_STEP)


def quantize_activations(x: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
    """Quantize the inputs of a linear.

    Args:
        x: (..., in_features), any float dtype.
        scheme: How.

    Returns:
        Codes like `x`, int8, and steps (..., 1) float32.
    """
    steps = step_sizes(x, scheme)
    scaled = x.float() / steps
    if scheme.rounding == 0:
        nearest = scaled.round()  # ties to even, as hardware does
    else:
        nearest = scaled.sign() * (scaled.abs() + (0.5 - scheme.rounding)).floor()
    codes = nearest.clamp(-scheme.largest_code, scheme.largest_code)
    return codes.to(torch.int8), steps


def fake_quantize(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """Return activations as their codes stand for them, shaped like `x` and in its dtype."""
    codes, steps = quantize_activations(x, scheme)
    return (codes.float() * steps).to(x.dtype)
