"""Format `dint`: integers, and plus and minus half a step. docs/format.md, section 12.

    w = scale / 2 * doubled,   doubled = 2 (code - zero_point), or 1, or -1

Doubled values are whole numbers: kernels that multiply int8 take them as they are
(`doubled_codes`), those of bit planes with one plane more (`to_affine`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qtool.base import Codec, PartSpec, QuantizedTensor
from qtool.core import dint, grouping
from qtool.core.packing import codes_to_planes, planes_to_codes
from qtool.errors import SchemeError
from qtool.formats import affine as affine_format
from qtool.formats._parts import cat_planes, joined
from qtool.scheme import MAX_BITS, Shape2D, WeightScheme

DINT = "dint"


def _layout(scheme: WeightScheme, shape: Shape2D) -> Mapping[str, PartSpec]:
    """Return the parts of a weight: those of an affine one."""
    if scheme.num_bits < dint.FEWEST_BITS:
        raise SchemeError(
            f"A dint weight has {dint.FEWEST_BITS} to {MAX_BITS} bits, not {scheme.num_bits}: two "
            "of its codes are half steps. Use 'gptq' or 'bcq' for fewer."
        )
    return affine_format.CODEC.layout(scheme, shape)


def encode_dint(
    codes: Tensor, scales: Tensor, zero_points: Tensor, scheme: WeightScheme, shape: Shape2D
) -> QuantizedTensor:
    """Pack solver results.

    Args:
        codes: (rows, num_groups, group_size) uint8, in rows of groups.
        scales: (rows, num_groups) float16, > 0.
        zero_points: (rows, num_groups) uint8, whole steps' codes; ignored if the scheme is
            symmetric.
        scheme: Bits and grouping.
        shape: Shape of the weight.
    """
    packed = affine_format.encode_affine(codes, scales, zero_points, scheme, shape)
    return replace(packed, format=DINT)


def _zero_points(tensor: QuantizedTensor) -> Tensor:
    """Return the zero points in the shape of the scales, uint8."""
    if tensor.scheme.symmetric:
        middle = dint.middle_code(tensor.scheme.num_bits)
        return torch.full_like(tensor.parts["scales"], middle, dtype=torch.uint8)
    return affine_format.zero_points(tensor)


def _doubled(tensor: QuantizedTensor) -> Tensor:
    """Return what the codes mean in half steps, (out_features, in_features) int16."""
    scheme, shape = tensor.scheme, tensor.shape
    codes = planes_to_codes(tensor.parts["codes"], shape.in_features)
    zeros = grouping.spread(_zero_points(tensor), scheme, shape)
    return dint.doubled_values(codes, zeros, scheme.num_bits)


def doubled_codes(tensor: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Return a weight as kernels multiply it: whole numbers, and what they are multiples of.

    Returns:
        (out_features, in_features) int8, and float32 in the shape of the stored scales.

    Raises:
        SchemeError: int8 doesn't hold them: above 6 bits, or 7 if the scheme is symmetric.
    """
    scheme = tensor.scheme
    widest = dint.WIDEST_IN_INT8[scheme.symmetric]
    if scheme.num_bits > widest:
        raise SchemeError(
            f"Doubled values of {scheme.num_bits} bits don't fit int8; those of {widest} do. "
            "Dequantize the weight."
        )
    return _doubled(tensor).to(torch.int8), tensor.parts["scales"].float() / 2


def affine_scheme(scheme: WeightScheme) -> WeightScheme:
    """Return the scheme of what `to_affine` makes.

    Raises:
        SchemeError: it has 8 bits already.
    """
    return replace(scheme, num_bits=scheme.num_bits + 1, symmetric=False)


def to_affine(tensor: QuantizedTensor) -> QuantizedTensor:
    """Return the same weight, to the bit, as an affine one of one bit more, for kernels of planes.

    It has zero points, and its scales, half of those that are stored, are float32.

    Raises:
        SchemeError: it has 8 bits already.
    """
    wider, half = affine_scheme(tensor.scheme), tensor.parts["scales"].float() / 2
    # One more than twice the zero point: below a grid that begins at 0 lies a half.
    shifted = (2 * _zero_points(tensor).to(torch.int16) + 1).clamp(max=2**wider.num_bits - 2)
    codes = _doubled(tensor) + grouping.spread(shifted, wider, tensor.shape)
    planes = codes_to_planes(codes.to(torch.uint8), wider.num_bits)
    return affine_format.packed_affine(planes, half, shifted.to(torch.uint8), wider, tensor.shape)


def _dequantize(tensor: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Return the weight, (out_features, in_features) in `dtype`."""
    scales = grouping.spread(tensor.parts["scales"].to(dtype), tensor.scheme, tensor.shape)
    return _doubled(tensor).to(dtype) / 2 * scales


def _cat(tensors: Sequence[QuantizedTensor], dim: int) -> QuantizedTensor:
    """Return weights below one another (dim 0), or beside one another."""
    shape, codes = joined(tensors, dim), cat_planes(tensors, "codes", dim)
    scales = torch.cat([tensor.parts["scales"] for tensor in tensors], dim)
    zeros = torch.cat([_zero_points(tensor) for tensor in tensors], dim)
    whole = affine_format.packed_affine(codes, scales, zeros, tensors[0].scheme, shape)
    return replace(whole, format=DINT)


def _narrow(tensor: QuantizedTensor, dim: int, start: int, length: int) -> QuantizedTensor:
    """Return a part of the rows (dim 0), or of the columns."""
    return replace(affine_format.CODEC.narrow(tensor, dim, start, length), format=DINT)


# Not trainable: learned codes move in planes, of which some sums are no levels here.
CODEC = Codec(version=1, layout=_layout, dequantize=_dequantize, cat=_cat, narrow=_narrow)
