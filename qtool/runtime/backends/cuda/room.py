"""How many bytes the kernels' layouts take, from schemes and shapes alone."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from qtool.base import QuantizedTensor
from qtool.checkpoint.manifest import num_bytes
from qtool.formats import affine, binary_coding, mixed_rows, ordered_affine
from qtool.runtime.backends.cuda import fusing, linear_kernels, tiles
from qtool.runtime.backends.cuda.centers import (
    is_tileable,
    padded_group,
    scheme_of_planes,
    why_no_planes,
)
from qtool.runtime.backends.cuda.panels import is_panelable, panels_bytes
from qtool.scheme import Shape2D

DENSE_BYTES = 2
"""Per weight that runs dequantized, in 16 bits."""
ORDER_BYTES = 8
"""Per column of sorted or padded inputs: which input it has."""
ROW_NUMBERS = 8
"""Bytes per row: where the rows of a class belong, and in which class a row is."""


def card_bytes(tensor: QuantizedTensor, card_name: str = "", *, keep_stored: bool = True) -> int:
    """Return what `prepare_weight` holds of a weight.

    Args:
        tensor: Its parts aren't looked at, and may be missing.
        card_name: That runs it; empty: the first one that was measured.
        keep_stored: Stored parts are kept where a kernel reads them.
    """
    if tensor.format == mixed_rows.MIXED_ROWS:
        classes = [_class(tensor, *each) for each in tensor.scheme.classes(tensor.shape)]
        numbers = ROW_NUMBERS * tensor.shape.out_features
        return numbers + sum(card_bytes(each, card_name, keep_stored=False) for each in classes)
    if tensor.format == ordered_affine.ORDERED_AFFINE:
        inner = replace(tensor, format=affine.AFFINE)
        sorts = 0 if padded_group(inner) else ORDER_BYTES * tensor.shape.in_features
        return sorts + card_bytes(inner, card_name, keep_stored=keep_stored)
    if why_no_planes(tensor) is not None:
        return DENSE_BYTES * prod(tensor.shape)
    planes = replace(tensor, format=binary_coding.BINARY_CODING, scheme=scheme_of_planes(tensor))
    return _bytes_of_planes(planes, card_name, padded_group(tensor), keep_stored=keep_stored)


def _bytes_of_planes(
    planes: QuantizedTensor, card_name: str, padded: int | None, *, keep_stored: bool
) -> int:
    """Return what is held of a weight of planes, whose groups may be padded to so many inputs."""
    if padded is not None:
        columns = planes.scheme.num_groups(planes.shape) * padded
        scheme = replace(planes.scheme, group_size=padded)
        shape = planes.shape._replace(in_features=columns)
        whole = replace(planes, scheme=scheme, shape=shape)
        return ORDER_BYTES * columns + card_bytes(whole, card_name, keep_stored=keep_stored)
    stored = sum(map(num_bytes, binary_coding.CODEC.layout(planes.scheme, planes.shape).values()))
    if is_panelable(planes):
        return panels_bytes(planes.scheme, planes.shape)
    if not is_tileable(planes):
        return stored
    doubled = keep_stored and linear_kernels.suits_tables(planes, card_name)
    return tiles.packed_bytes(planes.scheme, planes.shape) + doubled * stored


def fused_bytes(
    tensors: Sequence[QuantizedTensor], card_name: str = "", *, interleave: bool = False
) -> int | None:
    """Return what weights that share an input take as one; None: they stay apart."""
    if not fusing.are_fusible(tensors, interleave=interleave):
        return None
    if interleave and is_panelable(tensors[0]):
        return sum(card_bytes(each, card_name, keep_stored=False) for each in tensors)
    rows = sum(each.shape.out_features for each in tensors)
    whole = replace(tensors[0], shape=tensors[0].shape._replace(out_features=rows))
    return card_bytes(whole, card_name, keep_stored=not interleave)


def _class(tensor: QuantizedTensor, num_bits: int, count: int) -> QuantizedTensor:
    scheme = tensor.scheme.uniform(num_bits)
    shape = Shape2D(count, tensor.shape.in_features)
    return QuantizedTensor(binary_coding.BINARY_CODING, scheme, shape, {})
