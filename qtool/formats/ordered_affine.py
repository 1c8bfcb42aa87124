"""Format `ordered_affine`: an affine weight whose inputs are sorted. docs/format.md, section 14.

    w[o, input_order[j]] = scale[o, j // group_size] * (code[o, j] - zero_point[o, j // group_size])

GPTQ with activation order groups inputs that aren't neighbours; sorted, they are, and all but the
order is what `affine` has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qtool.base import Codec, PartSpec, QuantizedTensor
from qtool.errors import SchemeError
from qtool.formats import affine
from qtool.formats._parts import narrowed
from qtool.scheme import Shape2D, WeightScheme

ORDERED_AFFINE = "ordered_affine"
INPUT_ORDER = "input_order"


def _layout(scheme: WeightScheme, shape: Shape2D) -> Mapping[str, PartSpec]:
    """Return the parts of a weight: those of an affine one, and which input each column has."""
    if scheme.group_dim != "in_features":
        raise SchemeError(
            f"Groups run along {scheme.group_dim}; where inputs are sorted by group, in_features "
            "is meant."
        )
    order = PartSpec("int32", (shape.in_features,), is_order=True)
    return {**affine.CODEC.layout(scheme, shape), INPUT_ORDER: order}


def encode_ordered(sorted_weight: QuantizedTensor, order: Tensor) -> QuantizedTensor:
    """Return a weight of one whose columns are sorted.

    Args:
        sorted_weight: Of format `affine`.
        order: (in_features,) which input each of its columns has.
    """
    parts = {**sorted_weight.parts, INPUT_ORDER: order.to(torch.int32)}
    return replace(sorted_weight, format=ORDERED_AFFINE, parts=parts)


def split_order(tensor: QuantizedTensor) -> tuple[QuantizedTensor, Tensor]:
    """Return an affine weight of sorted columns, and (in_features,) int64 which input each has."""
    parts = {name: part for name, part in tensor.parts.items() if name != INPUT_ORDER}
    return replace(tensor, format=affine.AFFINE, parts=parts), tensor.parts[INPUT_ORDER].long()


def _dequantize(tensor: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Return the weight, (out_features, in_features) in `dtype`."""
    plain, order = split_order(tensor)
    return affine.CODEC.dequantize(plain, dtype)[:, order.argsort()]


def _cat(tensors: Sequence[QuantizedTensor], dim: int) -> QuantizedTensor:
    """Return weights below one another (dim 0), if their order is one, or beside one another."""
    plain, orders = zip(*map(split_order, tensors), strict=True)
    whole = affine.CODEC.cat(plain, dim)
    if dim == 0:
        if any(not torch.equal(order, orders[0]) for order in orders[1:]):
            raise SchemeError(
                "Weights whose inputs are sorted in another order don't make one. Leave them apart."
            )
        return encode_ordered(whole, orders[0])
    begins = [sum(one.shape.in_features for one in plain[:number]) for number in range(len(plain))]
    moved = [order + begin for order, begin in zip(orders, begins, strict=True)]
    return encode_ordered(whole, torch.cat(moved))


def _narrow(tensor: QuantizedTensor, dim: int, start: int, length: int) -> QuantizedTensor:
    """Return a part of the rows (dim 0), or of the inputs, if these are neighbours once sorted."""
    plain, order = split_order(tensor)
    if dim == 0:
        return encode_ordered(affine.CODEC.narrow(plain, dim, start, length), order)
    narrowed(tensor, dim, start, length, check_groups=False)
    places = ((order >= start) & (order < start + length)).nonzero().squeeze(1)
    first = int(places[0])
    if int(places[-1]) - first + 1 != length:
        raise SchemeError(
            f"in_features {start} to {start + length} aren't neighbours once they are sorted by "
            "group, so they have no groups of their own. Split such a weight by rows."
        )
    part = affine.CODEC.narrow(plain, dim, first, length)
    return encode_ordered(part, order[first : first + length] - start)


CODEC = Codec(version=1, layout=_layout, dequantize=_dequantize, cat=_cat, narrow=_narrow)
