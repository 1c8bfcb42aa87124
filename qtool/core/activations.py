"""Quantized activations: symmetric integers times a step per token, or per tensor."""

from collections.abc import Callable

import torch
from torch import Tensor

from qtool.scheme import ActivationScheme

SMALLEST_STEP = 1e-8
"""Of a token of zeros, whose codes are all zero; 1 / step is finite."""


def step_sizes(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """Return the steps of activations (..., in_features): (..., 1) float32."""
    if scheme.scale is not None:
        step = max(scheme.scale, SMALLEST_STEP)
        return torch.full_like(x[..., :1], step, dtype=torch.float32)
    largest = x.abs().amax(-1, keepdim=True).float()
    codes = torch.full_like(largest, scheme.largest_code)  # a card would take a number's reciprocal
    return (scheme.clip_ratio * largest / codes).clamp(min=SMALLEST_STEP)


def quantize_activations(x: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
    """Quantize the inputs of a linear: x times 1 / step, each rounded to float32, to integers.

    Args:
        x: (..., in_features), any float dtype.
        scheme: How.

    Returns:
        Codes like `x`, int8, and steps (..., 1) float32.
    """
    steps = step_sizes(x, scheme)
    scaled = x.float() * (1.0 / steps)
    if scheme.rounding == 0:
        nearest = scaled.round()  # ties to even, as hardware does
    else:
        nearest = scaled.sign() * (scaled.abs() + (0.5 - scheme.rounding)).floor()
    codes = nearest.clamp(-scheme.largest_code, scheme.largest_code)
    return codes.to(torch.int8), steps


def fake_quantize(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """Return activations as their codes stand for them, shaped like `x` and in its dtype.

    To find what a layer will do; `multiply_quantized`, which it does, doesn't round to that dtype.
    """
    codes, steps = quantize_activations(x, scheme)
    return (codes.float() * steps).to(x.dtype)


def multiply_quantized(
    x: Tensor, scheme: ActivationScheme, product: Callable[[Tensor], Tensor]
) -> Tensor:
    """Multiply quantized activations by a weight: the definition of what a layer computes.

    The product gets the codes over 2^(k-1), and the steps come after it. These are exact in
    float16 and bfloat16, where codes times steps aren't; and they are below 1, so that an output
    stays below the sum of the absolute weights of its row, where codes alone would leave float16.

    Args:
        x: (..., in_features), any float dtype.
        scheme: How `x` is quantized.
        product: Multiplies (..., in_features) by the weight, in the dtype of `x`.

    Returns:
        (..., out_features) in the dtype of `x`.
    """
    codes, steps = quantize_activations(x, scheme)
    unit = 2.0 ** (1 - scheme.num_bits)
    return (product(codes.to(x.dtype) * unit) * (steps / unit)).to(x.dtype)
