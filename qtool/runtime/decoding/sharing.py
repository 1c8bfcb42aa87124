"""Parts of a fused weight as weights of their own, so that a model isn't held twice.

The decoder runs queries, keys and values as one weight, and gate and up as another. Modules that
are called one by one, when transformers runs the model, see their part of it through these.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qtool.runtime.linear_kernels import RUN, KernelWeight
from qtool.runtime.tiles import TILE_ROWS, Tiles
from qtool.scheme import Shape2D

GATE_BITS = 0x55555555
"""Bits of a word of tiles that belong to the upper eight rows of a tile."""


def packed_rows(fused: KernelWeight, first: int, count: int) -> KernelWeight | None:
    """Return a view of some rows; None where they don't begin and end with a tile."""
    last = first + count
    ends = last % TILE_ROWS == 0 or last == fused.shape.out_features
    if fused.tiles is None or first % TILE_ROWS or not ends:
        return None
    part = slice(first // TILE_ROWS, -(-last // TILE_ROWS))
    return _with_tiles(fused, count, Tiles(fused.tiles.planes[part], fused.tiles.scales[part]))


def packed_half(fused: KernelWeight, half: int) -> KernelWeight:
    """Return gate (0) or up (1) of an interleaved weight: a copy, made of words as they are.

    Of this copy the kernels may read nothing before they have waited: it is fresh.
    """
    assert fused.tiles is not None
    low, high = _pairs(fused.tiles.planes)
    if half == 0:
        planes = (low & GATE_BITS) | ((high & GATE_BITS) << 1)
    else:
        planes = ((low >> 1) & GATE_BITS) | (high & ~GATE_BITS)
    first, second = _pairs(fused.tiles.scales)
    scales = torch.stack([first[..., half], second[..., half]], dim=-1)
    return replace(
        _with_tiles(fused, fused.shape.out_features // 2, Tiles(planes, scales)), fresh=True
    )


def dense_half(fused: Tensor, half: int) -> Tensor:
    """Return gate (0) or up (1) of an interleaved dense weight: a copy."""
    return fused.unflatten(0, (-1, 2, RUN))[:, half].flatten(0, 1)


def _pairs(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return even and odd tiles, as many of each."""
    missing = tiles.new_zeros(len(tiles) % 2, *tiles.shape[1:])
    both = torch.cat([tiles, missing]) if len(missing) else tiles
    return both[0::2], both[1::2]


def _with_tiles(fused: KernelWeight, rows: int, tiles: Tiles) -> KernelWeight:
    shape = Shape2D(rows, fused.shape.in_features)
    return KernelWeight(fused.scheme, shape, fused.dtype, tiles, None, fused.centered)
