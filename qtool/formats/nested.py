"""Format `nested`: steps and minima that are whole multiples of a few float16 numbers.

    w = super_scale * scale_code * code - super_minimum * minimum_code

The k-quants of GGUF to the bit, in as many bits. Specified in docs/format.md, section 16.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qtool.base import Codec, PartSpec, QuantizedTensor
from qtool.core.packing import codes_to_planes, num_words, planes_to_codes
from qtool.errors import SchemeError
from qtool.formats import _steps
from qtool.formats._parts import (
    DIMS,
    cat_planes,
    joined,
    narrow_planes,
    narrowed,
    refuse_cut,
    refuse_keys,
)
from qtool.scheme import Shape2D, WeightScheme

NESTED = "nested"
SUPER_SIZE = 256
"""Weights of a row that share a super-scale, if a group isn't larger."""
CODE_BITS = (4, 4, 6, 6, 6, 8, 8, 8)
"""Of scale and minimum codes, for weights of 1 to 8 bits."""


def groups_per_super(scheme: WeightScheme) -> int:
    """Return how many neighbouring groups share a super-scale."""
    return max(1, SUPER_SIZE // scheme.group_size) if scheme.group_size else 1


def _layout(scheme: WeightScheme, shape: Shape2D) -> Mapping[str, PartSpec]:
    """Return the parts of a weight: codes, scales of two levels, minima likewise."""
    refuse_keys(scheme)
    bits, groups, rows = scheme.num_bits, scheme.num_groups(shape), scheme.num_rows(shape)
    supers = -(-groups // groups_per_super(scheme))
    coded = PartSpec("int32", (CODE_BITS[bits - 1], groups, num_words(rows)))
    by_row = scheme.group_dim == "in_features"
    whole = PartSpec("float16", (rows, supers) if by_row else (supers, rows))
    parts = {
        "codes": PartSpec("int32", (bits, shape.out_features, num_words(shape.in_features))),
        "scale_codes": coded,
        "super_scales": whole,
    }
    if not scheme.symmetric:
        parts |= {"minimum_codes": coded, "super_minima": whole}
    return parts


def encode_nested(
    codes: Tensor,
    scales: tuple[Tensor, Tensor],
    minima: tuple[Tensor, Tensor] | None,
    scheme: WeightScheme,
) -> QuantizedTensor:
    """Pack a weight with groups along in_features.

    Args:
        codes: (out_features, in_features) uint8.
        scales: Scale codes (out_features, num_groups) uint8, with half of their range added if the
            scheme is symmetric, and super-scales (out_features, supers) float16.
        minima: Likewise, nothing added; None if the scheme is symmetric.
        scheme: Bits and grouping.
    """
    width = CODE_BITS[scheme.num_bits - 1]
    parts = {
        "codes": codes_to_planes(codes, scheme.num_bits),
        "scale_codes": codes_to_planes(scales[0].T, width),
        "super_scales": scales[1].contiguous(),
    }
    if minima is not None:
        parts["minimum_codes"] = codes_to_planes(minima[0].T, width)
        parts["super_minima"] = minima[1].contiguous()
    return QuantizedTensor(NESTED, scheme, Shape2D(*codes.shape), parts)


def _multiplied(tensor: QuantizedTensor, which: tuple[str, str], least: int) -> Tensor:
    """Return codes, counted from `least`, times what they are multiples of; (groups, rows)."""
    coded, whole = which
    by_row = tensor.scheme.group_dim == "in_features"
    planes, shared = tensor.parts[coded], tensor.parts[whole]
    codes = planes_to_codes(planes, tensor.scheme.num_rows(tensor.shape)).double() + least
    per = groups_per_super(tensor.scheme)
    shared = (shared.T if by_row else shared).repeat_interleave(per, dim=0)
    return codes * shared[: len(codes)]


def _parameters(tensor: QuantizedTensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return steps and minima in the stored shape of group parameters; exact in float32."""
    scheme = tensor.scheme
    least = -(2 ** (CODE_BITS[scheme.num_bits - 1] - 1)) if scheme.symmetric else 0
    steps = _multiplied(tensor, ("scale_codes", "super_scales"), least).to(dtype)
    if scheme.symmetric:
        minima = _steps.symmetric_minima(steps, scheme.num_bits)
    else:
        minima = -_multiplied(tensor, ("minimum_codes", "super_minima"), 0).to(dtype)
    if scheme.group_dim == "in_features":
        return steps.T.contiguous(), minima.T.contiguous()
    return steps, minima


def nested_to_binary(tensor: QuantizedTensor) -> QuantizedTensor:
    """Return the same weight as a binary-coded one with float32 parameters, offsets rounded."""
    return _steps.stepped_to_binary(tensor, _parameters)


def _dequantize(tensor: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Return the weight, (out_features, in_features) in `dtype`, rounded once from float32."""
    return _steps.stepped_dequantize(tensor, dtype, _parameters)


def _cat(tensors: Sequence[QuantizedTensor], dim: int) -> QuantizedTensor:
    """Return weights below one another (dim 0), or beside one another."""
    scheme, shape = tensors[0].scheme, joined(tensors, dim)
    along, parts = DIMS[dim] == scheme.group_dim, {"codes": cat_planes(tensors, "codes", dim)}
    size = (scheme.group_size or 0) * groups_per_super(scheme)
    if along and any(each.shape[dim] % size for each in tensors[:-1]):
        raise SchemeError(
            f"A super-scale of {size} {DIMS[dim]} would go on from one weight to the next. Only "
            "the last may end within its groups."
        )
    for name in tensors[0].parts.keys() - parts.keys():
        each = [tensor.parts[name] for tensor in tensors]
        if name.startswith("super"):
            parts[name] = torch.cat(each, dim)
        elif along:
            parts[name] = torch.cat(each, 1)
        else:
            parts[name] = _below(tensors, name)
    return QuantizedTensor(NESTED, scheme, shape, parts)


def _below(tensors: Sequence[QuantizedTensor], name: str) -> Tensor:
    """Return codes of groups, packed along rows, as those of all rows."""
    rows = [planes_to_codes(each.parts[name], each.scheme.num_rows(each.shape)) for each in tensors]
    return codes_to_planes(torch.cat(rows, 1), len(tensors[0].parts[name]))


def _narrow(tensor: QuantizedTensor, dim: int, start: int, length: int) -> QuantizedTensor:
    """Return a part of the rows (dim 0), or of the columns."""
    scheme, shape = tensor.scheme, narrowed(tensor, dim, start, length)
    along, whole = DIMS[dim] == scheme.group_dim, tensor.shape[dim]
    size, end = scheme.group_size or whole, start + length
    shared = size * groups_per_super(scheme) if along else 1
    if along:
        refuse_cut(DIMS[dim], shared, start, length)
    supers = slice(start // shared, -(-end // shared))
    parts = {"codes": narrow_planes(tensor.parts["codes"], dim, start, length)}
    for name in tensor.parts.keys() - parts.keys():
        part = tensor.parts[name]
        if name.startswith("super"):
            parts[name] = part.narrow(dim, supers.start, supers.stop - supers.start).contiguous()
        elif along:
            parts[name] = part[:, start // size : -(-end // size)].contiguous()
        else:
            parts[name] = narrow_planes(part, 1, start, length)
    return QuantizedTensor(NESTED, scheme, shape, parts)


CODEC = Codec(version=1, layout=_layout, dequantize=_dequantize, cat=_cat, narrow=_narrow)
