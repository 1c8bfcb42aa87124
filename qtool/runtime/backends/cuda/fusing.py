"""Weights that share an input as one, so that a step has fewer launches and a card holds them once.

Queries, keys and values lie one below the other; rows of gate and up alternate in runs of eight, so
that a tile has both. Modules that are called one by one see their part through these.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from qtool.base import Fused, QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.core.layout import RUN
from qtool.formats.mixed_rows import MIXED_ROWS
from qtool.formats.ordered_affine import ORDERED_AFFINE
from qtool.runtime.backends.cuda import tiles
from qtool.runtime.backends.cuda.centers import CENTERS, is_tileable, planes_of
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.linear_kernels import prepare
from qtool.runtime.backends.cuda.panels import Panels, is_panelable
from qtool.runtime.backends.cuda.tiles import TILE_ROWS, Tiles, pack_parameters
from qtool.scheme import Shape2D

APART = (MIXED_ROWS, ORDERED_AFFINE)
"""Formats of which `fuse` makes nothing: classes of rows, inputs in an order of their own."""
GATE_BITS = 0x55555555
"""Bits of a word of tiles that belong to the upper eight rows of a tile."""
SET_DIM = 2
"""Of the parts of panels: gate and up."""
ROW_DIM = -2
"""Of every part of planes whose groups run along in_features."""


@dataclass(frozen=True, slots=True)
class HalfWeight:
    """Gate (0) or up (1) of a weight whose rows alternate."""

    fused: KernelWeight
    half: int

    def weight(self) -> KernelWeight:
        """Return it alone: a copy, made of words as they are.

        Of this copy the kernels may read nothing before they have waited: it is fresh.
        """
        if self.fused.panels is not None:
            return replace(_half_of_panels(self.fused, self.fused.panels, self.half), fresh=True)
        assert self.fused.tiles is not None
        low, high = _pairs(self.fused.tiles.planes)
        if self.fused.centered:
            sets = zip(tiles.by_nibble(low), tiles.by_nibble(high), strict=True)
            planes = torch.cat([_half_of_nibbles(*each, self.half) for each in sets], 2)
        else:
            planes = _half_of_planes(low, high, self.half)
        first, second = _pairs(self.fused.tiles.scales)
        scales = torch.stack([first[..., self.half], second[..., self.half]], dim=-1)
        rows = self.fused.shape.out_features // 2
        return replace(_with_tiles(self.fused, rows, Tiles(planes, scales)), fresh=True)

    def rescale(self, tensor: QuantizedTensor) -> bool:
        """Do what `KernelWeight.rescale` does, for this half."""
        fused, new = self.fused, planes_of(tensor)
        if fused.tiles is None or fused.centered or CENTERS in new.parts:
            return False
        packed = pack_parameters(new)
        first, second = fused.tiles.scales[0::2], fused.tiles.scales[1::2]
        if packed.shape != (len(first), *first.shape[1:]):
            return False
        first[..., self.half].copy_(packed[..., 0])
        second[..., self.half].copy_(packed[: len(second), ..., 1])
        return True

    def dense(self) -> Tensor:
        """Return it by the definition of its format."""
        return self.weight().dense()


def _half_of_planes(low: Tensor, high: Tensor, half: int) -> Tensor:
    """Return words of one half's rows, from those of two tiles: of the upper, or lower, eight."""
    if half == 0:
        return (low & GATE_BITS) | ((high & GATE_BITS) << 1)
    return ((low >> 1) & GATE_BITS) | (high & ~GATE_BITS)


def _half_of_nibbles(low: Tensor, high: Tensor, half: int) -> Tensor:
    """Do `_half_of_planes` of words (..., up to 4, 32, 4) as kernels/bit_plane_nibbles.cuh says."""
    count = low.shape[2]
    if count == 1:
        return _half_of_planes(low, high, half)
    pair = [tiles.nibble_words(each)[:, :, half::2] for each in (low, high)]
    return tiles.stored_words(torch.stack(pair, 3).flatten(2, 3), count)


def are_fusible(tensors: Sequence[QuantizedTensor], *, interleave: bool = False) -> bool:
    """Return whether `fuse` makes one of weights; their parts aren't looked at."""
    first, rows = tensors[0], [tensor.shape.out_features for tensor in tensors]
    kinds = {(one.format, one.scheme, one.shape.in_features) for one in tensors}
    if len(kinds) > 1 or first.format in APART:
        return False
    if is_panelable(first):
        size = first.scheme.group_size
        whole = size is not None and not any(count % size for count in rows[:-1])
        return rows[0] == rows[1] and rows[0] % RUN == 0 if interleave else whole
    if not is_tileable(first):
        return False
    return not interleave or (rows[0] == rows[1] and rows[0] % RUN == 0)


def fuse(
    tensors: Sequence[QuantizedTensor], dtype: torch.dtype, *, interleave: bool = False
) -> Fused | None:
    """Do `Backend.fuse`; None if schemes or formats differ, or the kernels' tiles do.

    And of rows of unlike bits: each class is a weight of its own.
    """
    if not are_fusible(tensors, interleave=interleave):
        return None
    first, rows = tensors[0], [tensor.shape.out_features for tensor in tensors]
    if interleave and is_panelable(first):
        fused = _alternating(*(prepare(one, dtype, keep_stored=False) for one in tensors))
        return Fused(fused, (HalfWeight(fused, 0), HalfWeight(fused, 1)))
    whole = planes_of(codec(first.format).cat(tensors, 0))
    if interleave:
        order = interleaved_order(rows[0]).to(first.parts[next(iter(first.parts))].device)
        parts = {name: part.index_select(ROW_DIM, order) for name, part in whole.parts.items()}
        fused = prepare(replace(whole, parts=parts), dtype, keep_stored=False)
        return Fused(fused, (HalfWeight(fused, 0), HalfWeight(fused, 1)))
    fused = prepare(whole, dtype)
    begins = accumulate(rows[:-1], initial=0)
    return Fused(fused, tuple(map(rows_of, [fused] * len(rows), begins, rows)))


def interleaved_order(rows: int) -> Tensor:
    """Return where the rows of [gate; up] go: (2 rows,) int64."""
    return torch.arange(2 * rows).view(2, rows // RUN, RUN).transpose(0, 1).flatten()


def rows_of(fused: KernelWeight, first: int, count: int) -> KernelWeight | None:
    """Return a view of some rows; None where they don't begin and end with a tile."""
    last = first + count
    if fused.panels is not None:
        return _groups_of_panels(fused, fused.panels, first, count)
    ends = last % TILE_ROWS == 0 or last == fused.shape.out_features
    if fused.tiles is None or first % TILE_ROWS or not ends:
        return None
    part = slice(first // TILE_ROWS, -(-last // TILE_ROWS))
    return _with_tiles(fused, count, Tiles(fused.tiles.planes[part], fused.tiles.scales[part]))


def _alternating(gate: KernelWeight, up: KernelWeight) -> KernelWeight:
    """Return two weights of panels as one whose panels alternate."""
    assert gate.panels is not None
    assert up.panels is not None
    both, rows = (gate.panels, up.panels), 2 * gate.shape.out_features
    planes = torch.cat([each.planes for each in both], dim=SET_DIM)
    scales = torch.cat([each.scales for each in both], dim=SET_DIM)
    packed = Panels(planes, scales, gate.panels.group_rows)
    return replace(gate, shape=gate.shape._replace(out_features=rows), panels=packed)


def _half_of_panels(fused: KernelWeight, packed: Panels, half: int) -> KernelWeight:
    planes, scales = (
        each[:, :, half : half + 1].contiguous() for each in (packed.planes, packed.scales)
    )
    shape = fused.shape._replace(out_features=fused.shape.out_features // packed.sets)
    return replace(fused, shape=shape, panels=Panels(planes, scales, packed.group_rows))


def _groups_of_panels(
    fused: KernelWeight, packed: Panels, first: int, count: int
) -> KernelWeight | None:
    """Return a view of whole groups of rows; None: a group begins before them."""
    if first % packed.group_rows:
        return None
    groups = slice(first // packed.group_rows, -(-(first + count) // packed.group_rows))
    panels = slice(groups.start * packed.of_group, groups.stop * packed.of_group)
    view = Panels(packed.planes[panels], packed.scales[groups], packed.group_rows)
    shape = fused.shape._replace(out_features=count)
    return replace(fused, shape=shape, panels=view, stored=None)


def _pairs(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return even and odd tiles, as many of each."""
    missing = tiles.new_zeros(len(tiles) % 2, *tiles.shape[1:])
    both = torch.cat([tiles, missing]) if len(missing) else tiles
    return both[0::2], both[1::2]


def _with_tiles(fused: KernelWeight, rows: int, tiles: Tiles) -> KernelWeight:
    shape = Shape2D(rows, fused.shape.in_features)
    return replace(fused, shape=shape, tiles=tiles, stored=None)
