"""Format `binary_coding`: w = offset + sum_i plane_scale_i * b_i. docs/format.md, section 3."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qtool.base import Codec, PartSpec, QuantizedTensor, Trainable
from qtool.core import binary_coding, grouping, learned
from qtool.core.packing import codes_to_planes, num_words, planes_to_codes, unpack_bits
from qtool.errors import SchemeError
from qtool.formats import affine as affine_format
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

BINARY_CODING = "binary_coding"


def _layout(scheme: WeightScheme, shape: Shape2D) -> Mapping[str, PartSpec]:
    """Return the parts of a weight: bit planes, plane scales and, unless symmetric, offsets."""
    refuse_keys(scheme)
    bits, parameters = scheme.num_bits, scheme.parameter_shape(shape)
    parts = {
        "bit_planes": PartSpec("int32", (bits, shape.out_features, num_words(shape.in_features))),
        "plane_scales": PartSpec("float16", (bits, *parameters), lowest=0),
    }
    if not scheme.symmetric:
        parts["plane_offsets"] = PartSpec("float16", parameters)
    return parts


def encode_binary(
    codes: Tensor, scales: Tensor, offsets: Tensor, scheme: WeightScheme, shape: Shape2D
) -> QuantizedTensor:
    """Pack solver results.

    Args:
        codes: (rows, num_groups, group_size) uint8; bit num_bits-1-i is the sign of plane i.
        scales: (rows, num_groups, num_bits) float16, >= 0, descending.
        offsets: (rows, num_groups) float16; ignored if the scheme is symmetric.
        scheme: Bits and grouping.
        shape: Shape of the weight.
    """
    matrix = grouping.to_rows(grouping.join(codes, scheme.grouped_length(shape)), scheme)
    parts = {
        "bit_planes": codes_to_planes(matrix, scheme.num_bits),
        "plane_scales": grouping.to_stored(scales.permute(2, 0, 1), scheme),
    }
    if not scheme.symmetric:
        parts["plane_offsets"] = grouping.to_stored(offsets, scheme)
    return QuantizedTensor(BINARY_CODING, scheme, shape, parts)


def _dequantize(tensor: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Return the weight, (out_features, in_features) in `dtype`."""
    scheme, shape, parts = tensor.scheme, tensor.shape, tensor.parts
    if scheme.symmetric:
        weight = torch.zeros(shape, dtype=dtype, device=parts["bit_planes"].device)
    else:
        weight = grouping.spread(parts["plane_offsets"].to(dtype), scheme, shape).clone()
    for planes, scales in zip(parts["bit_planes"], parts["plane_scales"], strict=True):
        signs = unpack_bits(planes, shape.in_features).to(dtype).mul_(2).sub_(1)
        weight += signs * grouping.spread(scales.to(dtype), scheme, shape)
    return weight


def from_affine(tensor: QuantizedTensor, parameter_dtype: torch.dtype) -> QuantizedTensor:
    """Rewrite an affine weight as a binary-coded one; the codes become the planes unchanged.

    Args:
        tensor: A weight of format `affine`.
        parameter_dtype: float64 makes the identity exact; in float16, scales stay exact unless
            they underflow, and offsets round once.

    Raises:
        SchemeError: the weight isn't affine.
    """
    if tensor.format != affine_format.AFFINE:
        raise SchemeError(f"from_affine takes an affine weight; this one is {tensor.format}.")
    scheme = tensor.scheme
    scales, offsets = binary_coding.scales_from_affine(
        tensor.parts["scales"].double(), affine_format.zero_points(tensor), num_bits=scheme.num_bits
    )
    parts = {
        "bit_planes": tensor.parts["codes"],
        "plane_scales": scales.permute(2, 0, 1).contiguous().to(parameter_dtype),
        "plane_offsets": offsets.to(parameter_dtype),
    }
    return QuantizedTensor(BINARY_CODING, replace(scheme, symmetric=False), tensor.shape, parts)


def _cat(tensors: Sequence[QuantizedTensor], dim: int) -> QuantizedTensor:
    """Return weights below one another (dim 0), or beside one another."""
    shape, parts = joined(tensors, dim), {"bit_planes": cat_planes(tensors, "bit_planes", dim)}
    for name in tensors[0].parts.keys() - parts.keys():
        parts[name] = torch.cat([tensor.parts[name] for tensor in tensors], dim - 2)
    return QuantizedTensor(BINARY_CODING, tensors[0].scheme, shape, parts)


def _narrow(tensor: QuantizedTensor, dim: int, start: int, length: int) -> QuantizedTensor:
    """Return a part of the rows (dim 0), or of the columns."""
    shape = narrowed(tensor, dim, start, length)
    parts = {"bit_planes": narrow_planes(tensor.parts["bit_planes"], dim, start, length)}
    for name in tensor.parts.keys() - parts.keys():
        parts[name] = narrow_parameters(tensor.parts[name], tensor, dim, start, length)
    return QuantizedTensor(BINARY_CODING, tensor.scheme, shape, parts)


def planes_in_order(tensor: QuantizedTensor) -> QuantizedTensor:
    """Return the same weight with its plane scales descending, as a file must have them.

    What learned single planes' scales, as adapters do, may have made a later plane the largest.
    """
    scheme, parts = tensor.scheme, tensor.parts
    scales = grouping.to_stored(parts["plane_scales"], scheme)
    if bool((scales[:-1] >= scales[1:]).all()):
        return tensor
    codes = codes_in_groups(planes_to_codes(parts["bit_planes"], tensor.shape.in_features), scheme)
    groups = codes.shape[:2]
    ordered, exchanged = binary_coding.canonical(
        scales.permute(1, 2, 0).flatten(0, 1), codes.flatten(0, 1)
    )
    offsets = scales[0]  # not read where there are none
    if not scheme.symmetric:
        offsets = grouping.to_stored(parts["plane_offsets"], scheme)
    unflat = exchanged.unflatten(0, groups), ordered.unflatten(0, groups)
    return encode_binary(*unflat, offsets, scheme, tensor.shape)


def descending(scales: Tensor) -> Tensor:
    """Keep learned plane scales (num_bits, ...) as they must be: not negative, none above the last.

    So the planes needn't be exchanged, and stay what they are to the bit.
    """
    return scales.clamp(min=0).cummin(0).values


def trainable(tensor: QuantizedTensor) -> Trainable:
    """Let scales and offsets of a weight be learned."""
    tensor = planes_in_order(tensor)  # else it wouldn't begin where the weight is
    scheme, shape, parts = tensor.scheme, tensor.shape, tensor.parts
    scales = grouping.to_stored(parts["plane_scales"].float(), scheme)
    codes = codes_in_groups(planes_to_codes(parts["bit_planes"], shape.in_features), scheme)
    parameters, gap = {"plane_scales": scales}, learned.mean_gaps(scales)
    if not scheme.symmetric:
        parameters["plane_offsets"] = grouping.to_stored(parts["plane_offsets"].float(), scheme)

    def planes(values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        ordered = descending(values["plane_scales"])
        return ordered, values.get("plane_offsets", torch.zeros_like(scales[0]))

    def stored(values: Mapping[str, Tensor], codes: Tensor) -> QuantizedTensor:
        found, offsets = (each.to(torch.float16) for each in planes(values))
        return encode_binary(codes, found.permute(1, 2, 0), offsets, scheme, shape)

    return Trainable(
        parameters=parameters,
        units=dict.fromkeys(parameters, gap),
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
    trainable=trainable,
)
