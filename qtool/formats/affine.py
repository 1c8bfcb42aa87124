"""Format `affine`: w = scale * (code - zero_point). Specified in docs/format.md, section 4.

Codes are stored as bit planes, most significant first, so that every bit width packs without
waste and the conversion to binary coding keeps them as they are.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qtool.base import Codec, PartSpec, QuantizedTensor, Trainable
from qtool.core import affine, grouping
from qtool.core.binary_coding import scales_from_affine
from qtool.core.packing import codes_to_planes, num_words, planes_to_codes
from qtool.errors import SchemeError
from qtool.formats._parts import (
    cat_planes,
    codes_in_groups,
    joined,
    narrow_parameters,
    narrow_planes,
    narrowed,
    refuse_keys,
)
from qtool.scheme import Shape2D, WeightScheme

AFFINE = "affine"


def _layout(scheme: WeightScheme, shape: Shape2D) -> Mapping[str, PartSpec]:
    """Return the parts of a weight: codes, scales and, unless symmetric, zero points."""
    refuse_keys(scheme)
    if scheme.symmetric and scheme.num_bits == 1:
        raise SchemeError(
            "A symmetric affine weight needs 2 bits: one bit would hold only 0 and -scale. "
            "Use 'bcq' for 1 bit."
        )
    bits, groups, rows = scheme.num_bits, scheme.num_groups(shape), scheme.num_rows(shape)
    parts = {
        "codes": PartSpec("int32", (bits, shape.out_features, num_words(shape.in_features))),
        "scales": PartSpec("float16", scheme.parameter_shape(shape), lowest=0),
    }
    if not scheme.symmetric:
        parts["zero_points"] = PartSpec("int32", (bits, groups, num_words(rows)))
    return parts


def encode_affine(
    codes: Tensor, scales: Tensor, zero_points: Tensor, scheme: WeightScheme, shape: Shape2D
) -> QuantizedTensor:
    """Pack solver results.

    Args:
        codes: (rows, num_groups, group_size) uint8, in rows of groups.
        scales: (rows, num_groups) float16, > 0.
        zero_points: (rows, num_groups) uint8; ignored if the scheme is symmetric.
        scheme: Bits and grouping.
        shape: Shape of the weight.
    """
    matrix = grouping.to_rows(grouping.join(codes, scheme.grouped_length(shape)), scheme)
    scales, zeros = (grouping.to_stored(each, scheme) for each in (scales, zero_points))
    return packed_affine(codes_to_planes(matrix, scheme.num_bits), scales, zeros, scheme, shape)


def zero_points(tensor: QuantizedTensor) -> Tensor:
    """Return the zero points in the shape of the scales, uint8."""
    scheme, scales = tensor.scheme, tensor.parts["scales"]
    if scheme.symmetric:
        return torch.full_like(scales, 2 ** (scheme.num_bits - 1), dtype=torch.uint8)
    by_group = planes_to_codes(tensor.parts["zero_points"], scheme.num_rows(tensor.shape))
    return by_group.T.contiguous() if scheme.group_dim == "in_features" else by_group


def _dequantize(tensor: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Return the weight, (out_features, in_features) in `dtype`."""
    scheme, shape = tensor.scheme, tensor.shape
    codes = planes_to_codes(tensor.parts["codes"], shape.in_features)
    scales, zeros = (
        grouping.spread(part, scheme, shape)
        for part in (tensor.parts["scales"], zero_points(tensor))
    )
    return affine.affine_values(codes, scales, zeros, dtype)


def _cat(tensors: Sequence[QuantizedTensor], dim: int) -> QuantizedTensor:
    """Return weights below one another (dim 0), or beside one another."""
    shape, codes = joined(tensors, dim), cat_planes(tensors, "codes", dim)
    scales = torch.cat([tensor.parts["scales"] for tensor in tensors], dim)
    zeros = torch.cat([zero_points(tensor) for tensor in tensors], dim)
    return packed_affine(codes, scales, zeros, tensors[0].scheme, shape)


def _narrow(tensor: QuantizedTensor, dim: int, start: int, length: int) -> QuantizedTensor:
    """Return a part of the rows (dim 0), or of the columns."""
    shape = narrowed(tensor, dim, start, length)
    codes = narrow_planes(tensor.parts["codes"], dim, start, length)
    scales, zeros = (
        narrow_parameters(part, tensor, dim, start, length)
        for part in (tensor.parts["scales"], zero_points(tensor))
    )
    return packed_affine(codes, scales, zeros, tensor.scheme, shape)


def packed_affine(
    codes: Tensor, scales: Tensor, zeros: Tensor, scheme: WeightScheme, shape: Shape2D
) -> QuantizedTensor:
    """Return a weight of parts as they are stored, but zero points in the shape of the scales."""
    parts = {"codes": codes, "scales": scales}
    if not scheme.symmetric:
        by_group = zeros.T if scheme.group_dim == "in_features" else zeros
        parts["zero_points"] = codes_to_planes(by_group, scheme.num_bits)
    return QuantizedTensor(AFFINE, scheme, shape, parts)


def _trainable(tensor: QuantizedTensor) -> Trainable:
    """Let the scales of a weight be learned; zero points are whole numbers and stay."""
    scheme, shape, num_bits = tensor.scheme, tensor.shape, tensor.scheme.num_bits
    scales = grouping.to_stored(tensor.parts["scales"].float(), scheme)
    zeros = grouping.to_stored(zero_points(tensor), scheme)
    codes = codes_in_groups(planes_to_codes(tensor.parts["codes"], shape.in_features), scheme)

    def planes(values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        positive = values["scales"].clamp(min=affine.SMALLEST_SCALE)
        found, offsets = scales_from_affine(positive, zeros, num_bits=num_bits)
        return found.movedim(-1, 0), offsets

    def stored(values: Mapping[str, Tensor], codes: Tensor) -> QuantizedTensor:
        found = values["scales"].clamp(min=affine.SMALLEST_SCALE).to(torch.float16)
        return encode_affine(codes, found, zeros, scheme, shape)

    return Trainable(
        parameters={"scales": scales},
        units={"scales": scales / 2 ** (num_bits - 1)},
        codes=codes,
        planes=planes,
        stored=stored,
    )


CODEC = Codec(
    version=1,
    layout=_layout,
    dequantize=_dequantize,
    cat=_cat,
    narrow=_narrow,
    trainable=_trainable,
)
