"""Weights of equal steps as the kernels read them: bit planes, and centers in place of offsets.

float16 would round an offset, scale * center with center = (2^num_bits - 1) / 2 - zero_point; at 8
bits that is a part of what quantizing costs. A center is a half-integer, which float16 holds as it
is, and the product of two float16 numbers is exact in float32: offset = center * plane_scales[0] *
2^(2 - num_bits).

The lowest value of a `minima` or `nested` weight needn't be a whole number of steps. Offsets o of
such a weight w are rounded to float16, and so are steps of `nested`; if it is symmetric, its
centers are -1/2, or 1/2 where a step is negative. Parameters below 2^-14 are off by up to 2^-25
each, and weights by as much as

    symmetric `minima`: 0            `minima`: 2^-11 |o|
    symmetric `nested`: 2^-11 |w|    `nested`: 2^-11 (|w - o| + |o|)
"""

from dataclasses import replace

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.formats import (
    affine,
    binary_coding,
    coded_scales,
    dint,
    minima,
    mixed_rows,
    nested,
)
from qtool.scheme import MAX_BITS, WeightScheme

CENTERS = "plane_centers"
"""The part that stands in for `plane_offsets`, in memory only."""
FINEST_GROUP = 32
"""Inputs of the finest group that the tiled kernels take."""
LEAST_PADDED = 8
"""Inputs of the finest group that is padded for them."""
STEPPED = {minima.MINIMA: minima.minima_to_binary, nested.NESTED: nested.nested_to_binary}
"""Of formats of imported weights: what makes planes of them, with float32 parameters."""


def is_tileable(tensor: QuantizedTensor) -> bool:
    """Return whether the tiled kernels can group the inputs of a weight."""
    size = tensor.scheme.group_size or tensor.shape.in_features
    whole = size % FINEST_GROUP == 0 or size >= tensor.shape.in_features
    return tensor.scheme.group_dim == "in_features" and whole


def padded_group(tensor: QuantizedTensor) -> int | None:
    """Return to how many inputs groups are padded for the tiled kernels; None: they aren't.

    At 8 inputs, three quarters of the planes are padding; parameters are more than the planes then,
    and what runs such a weight by the definition takes ten times as long. Neither rows of unlike
    bits nor imported weights are padded.
    """
    size, found = tensor.scheme.group_size, tensor.format
    if found in (mixed_rows.MIXED_ROWS, *STEPPED) or tensor.scheme.group_dim != "in_features":
        return None
    if size is None or size < LEAST_PADDED or is_tileable(tensor):
        return None
    return -(-size // FINEST_GROUP) * FINEST_GROUP


def why_no_planes(tensor: QuantizedTensor) -> str | None:
    """Return why a weight isn't run as planes, a sentence; None: it is. Parts aren't looked at.

    k-quants of 6 bits in groups of 16 would be 13 bits of planes and parameters, for the kernel
    that does all by the definition.
    """
    scheme = tensor.scheme
    if tensor.format == dint.DINT and scheme.num_bits == MAX_BITS:
        return f"of {MAX_BITS} bits, a {tensor.format} weight would be {MAX_BITS + 1} planes."
    if tensor.format in STEPPED and not is_tileable(tensor):
        found = f"{scheme.group_size or 'all'} {scheme.group_dim}"
        return (
            f"it runs {tensor.format} weights in groups of {FINEST_GROUP}, {2 * FINEST_GROUP} ... "
            f"in_features, or whole rows; these are of {found}."
        )
    return None


def scheme_of_planes(tensor: QuantizedTensor) -> WeightScheme:
    """Return the scheme of what `planes_of` makes; the parts aren't looked at."""
    if tensor.format == dint.DINT:
        return dint.affine_scheme(tensor.scheme)
    if tensor.format == affine.AFFINE or tensor.format in STEPPED:
        return replace(tensor.scheme, symmetric=False)
    return tensor.scheme


def planes_of(tensor: QuantizedTensor) -> QuantizedTensor:
    """Return a weight of planes with float16 parameters.

    One that is affine or dint, or has symmetric steps, gets the part CENTERS.
    """
    if tensor.format == coded_scales.CODED_SCALES:
        return coded_scales.to_binary(tensor)
    if tensor.format in STEPPED:
        return _planes_of_steps(tensor)
    if tensor.format == dint.DINT:
        tensor = dint.to_affine(tensor)
    if tensor.format != affine.AFFINE:
        return tensor
    binary = binary_coding.from_affine(tensor, torch.float16)
    middle = (2**tensor.scheme.num_bits - 1) / 2
    centers = (middle - affine.zero_points(tensor).float()).half()
    parts = {name: binary.parts[name] for name in ("bit_planes", "plane_scales")}
    return replace(binary, parts={**parts, CENTERS: centers})


def _planes_of_steps(tensor: QuantizedTensor) -> QuantizedTensor:
    """Return a `minima` or `nested` weight as one of planes."""
    binary = STEPPED[tensor.format](tensor)
    parts = dict(binary.parts)
    offsets = parts.pop("plane_offsets")
    parts["plane_scales"] = parts["plane_scales"].half()
    if tensor.scheme.symmetric:
        parts[CENTERS] = (offsets.sign() / 2).half()
    else:
        parts["plane_offsets"] = offsets.half()
    return replace(binary, parts=parts)


def weight_of(tensor: QuantizedTensor) -> Tensor:
    """Return what `planes_of` has made as a weight: (out_features, in_features) float32."""
    parts = dict(tensor.parts)
    if CENTERS in parts:
        per_center = parts["plane_scales"][0].float() * 2.0 ** (2 - tensor.scheme.num_bits)
        parts["plane_offsets"] = parts.pop(CENTERS).float() * per_center
    return binary_coding.CODEC.dequantize(replace(tensor, parts=parts), torch.float32)
