"""Affine weights as the kernels read them: bit planes, and centers in place of offsets.

float16 would round an offset, scale * center with center = (2^num_bits - 1) / 2 - zero_point; at 8
bits that is a part of what quantizing costs. A center is a half-integer, which float16 holds as it
is, and the product of two float16 numbers is exact in float32: offset = center * plane_scales[0] *
2^(2 - num_bits).
"""

from dataclasses import replace

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.formats import affine, binary_coding, coded_scales, dint
from qtool.scheme import MAX_BITS, WeightScheme

CENTERS = "plane_centers"
"""The part that stands in for `plane_offsets`, in memory only."""


def has_planes(tensor: QuantizedTensor) -> bool:
    """Return whether the kernels have as many planes as a weight is made of."""
    return tensor.format != dint.DINT or tensor.scheme.num_bits < MAX_BITS


def scheme_of_planes(tensor: QuantizedTensor) -> WeightScheme:
    """Return the scheme of what `planes_of` makes; the parts aren't looked at."""
    if tensor.format == dint.DINT:
        return dint.affine_scheme(tensor.scheme)
    if tensor.format == affine.AFFINE:
        return replace(tensor.scheme, symmetric=False)
    return tensor.scheme


def planes_of(tensor: QuantizedTensor) -> QuantizedTensor:
    """Return a weight of planes; one that is affine or dint gets the part CENTERS, float16."""
    if tensor.format == coded_scales.CODED_SCALES:
        return coded_scales.to_binary(tensor)
    if tensor.format == dint.DINT:
        tensor = dint.to_affine(tensor)
    if tensor.format != affine.AFFINE:
        return tensor
    binary = binary_coding.from_affine(tensor, torch.float16)
    middle = (2**tensor.scheme.num_bits - 1) / 2
    centers = (middle - affine.zero_points(tensor).float()).half()
    parts = {name: binary.parts[name] for name in ("bit_planes", "plane_scales")}
    return replace(binary, parts={**parts, CENTERS: centers})


def weight_of(tensor: QuantizedTensor) -> Tensor:
    """Return what `planes_of` has made as a weight: (out_features, in_features) float32."""
    parts = dict(tensor.parts)
    if CENTERS in parts:
        per_center = parts["plane_scales"][0].float() * 2.0 ** (2 - tensor.scheme.num_bits)
        parts["plane_offsets"] = parts.pop(CENTERS).float() * per_center
    return binary_coding.CODEC.dequantize(replace(tensor, parts=parts), torch.float32)
