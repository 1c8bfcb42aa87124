"""Weights of equal steps above a lowest value: what codecs of such weights share.

w = minimum + step * code, with a step and a minimum per group. The minimum needn't be a whole
number of steps, as it is in an affine weight, and a step may be negative.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.core import grouping
from qtool.core.packing import pack_bits, planes_to_codes
from qtool.formats.binary_coding import BINARY_CODING
from qtool.scheme import Shape2D, WeightScheme

Parameters = Callable[[QuantizedTensor, torch.dtype], tuple[Tensor, Tensor]]
"""Steps and minima of a format's weights in their stored shape, computed in a dtype."""


def stepped_dequantize(
    tensor: QuantizedTensor, dtype: torch.dtype, parameters: Parameters
) -> Tensor:
    """Return a weight, (out_features, in_features) in `dtype`, rounded once from float32."""
    steps, minima = parameters(tensor, working_dtype(dtype))
    codes, scheme, shape = tensor.parts["codes"], tensor.scheme, tensor.shape
    return step_values(codes, steps, minima, scheme, shape).to(dtype)


def stepped_to_binary(tensor: QuantizedTensor, parameters: Parameters) -> QuantizedTensor:
    """Return the same weight as a binary-coded one with float32 parameters, offsets rounded."""
    steps, minima = parameters(tensor, torch.float32)
    return binary_coded(tensor.parts["codes"], steps, minima, tensor.scheme, tensor.shape)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return in what values of `dtype` are computed: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def step_values(
    codes: Tensor, steps: Tensor, minima: Tensor, scheme: WeightScheme, shape: Shape2D
) -> Tensor:
    """Return minimum + step * code, (out_features, in_features) in the dtype of the steps.

    Args:
        codes: (num_bits, out_features, words) int32, packed planes.
        steps: In the stored shape of group parameters.
        minima: Likewise.
        scheme: Bits and grouping.
        shape: Shape of the weight.
    """
    found = planes_to_codes(codes, shape.in_features).to(steps.dtype)
    found *= grouping.spread(steps, scheme, shape)
    return found.add_(grouping.spread(minima, scheme, shape))


def symmetric_minima(steps: Tensor, num_bits: int) -> Tensor:
    """Return the minima of weights without any: half of all codes are below zero."""
    return steps * -(2.0 ** (num_bits - 1))


def binary_coded(
    codes: Tensor, steps: Tensor, minima: Tensor, scheme: WeightScheme, shape: Shape2D
) -> QuantizedTensor:
    """Return the same weight as a binary-coded one, whose parameters are float32.

    Plane scales are exact, offsets rounded once. Where a step is negative the planes are inverted:
    minimum + step * code = minimum + step * (2^k - 1) + |step| * (2^k - 1 - code). Arguments are
    those of `step_values`, in float32.
    """
    bits, falls = scheme.num_bits, steps < 0
    if bool(falls.any()):
        codes = codes ^ pack_bits(grouping.spread(falls, scheme, shape))
    unused = pack_bits(torch.ones(shape.in_features, dtype=torch.uint8, device=codes.device))
    powers = 2.0 ** (bits - 2 - torch.arange(bits, device=codes.device, dtype=torch.float32))
    offsets = minima.double() + steps.double() * ((2**bits - 1) / 2)
    parts = {
        "bit_planes": codes & unused,
        "plane_scales": steps.abs() * powers[:, None, None],
        "plane_offsets": offsets.float(),
    }
    return QuantizedTensor(BINARY_CODING, replace(scheme, symmetric=False), shape, parts)
