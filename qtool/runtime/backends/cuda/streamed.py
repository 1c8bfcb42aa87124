"""The grid of bit_plane_lookup_stream.cu: CTAs of about as many row tiles as warps."""

import functools
from typing import NamedTuple

import torch

from qtool.runtime.backends.cuda import planes
from qtool.runtime.backends.cuda.grids import room_of
from qtool.runtime.backends.cuda.launch import WARP, Card, KernelCall, constants
from qtool.runtime.backends.cuda.selection import BLOCK
from qtool.runtime.backends.cuda.tiles import TILE_ROWS

NAME = "bit_plane_lookup_stream"
WARPS, STAGES = 16, 2
MOST_AHEAD = 3
"""Units of inputs under way before they are multiplied, where there is room for twice as many."""
LEAST_TILES = 11
"""Of a CTA: fewer leave units to other warps whose inputs all have to stay in shared memory."""
STREAMED = range(9, BLOCK + 1)
"""Tokens: fewer are staged soon enough all at once, as timed, and more are bit_plane_wgmma.cu's."""
STREAMED_PLANES = (3, 4)
"""Of two, as many tokens are staged soon enough."""
BARRIER = 8
"""Bytes of one in shared memory."""


class Stream(NamedTuple):
    """How a CTA shares its part of a weight among its warps."""

    tiles: int
    """Of a CTA, one per warp; the other warps help."""
    main: int
    """Units of a tile that its own warp multiplies."""
    rest: int
    """Those that other warps do."""
    ahead: int
    """Units of inputs under way before they are multiplied."""
    shared_bytes: int


@functools.cache
def stream_of(
    row_tiles: int, units: int, batch: int, layout: planes.Layout, card: Card
) -> Stream | None:
    """Return how inputs come unit by unit; None: they don't, for this weight, tokens or card.

    CTAs have as few tiles as fill all waves of them.
    """
    product = planes.product_for(batch, layout, card)
    if not card.warpgroups or batch not in STREAMED or layout.planes not in STREAMED_PLANES:
        return None
    waves = -(-row_tiles // (card.multiprocessors * WARPS))
    tiles = -(-row_tiles // (card.multiprocessors * waves))
    if not product.looks_up or tiles < LEAST_TILES:
        return None
    main = tiles * units // WARPS
    for ahead in range(min(MOST_AHEAD, main), 0, -1):
        x = (2 * ahead + units - main) * planes.BLOCKS_PER_UNIT * product.columns * product.x_bytes
        parts = (WARPS - 1) * TILE_ROWS * product.columns * planes.NUMBER
        shared = WARPS * STAGES * product.stage_bytes(layout) + x + 2 * ahead * BARRIER
        if tiles < WARPS:
            shared += parts
        if shared <= room_of(card, 1):
            return Stream(tiles, main, units - main, ahead, shared)
    return None


def streamed_call(
    sizes: planes.Sizes, layout: planes.Layout, dtype: torch.dtype, card: Card, epilogue: str
) -> KernelCall | None:
    """Return the launch of a product whose inputs come unit by unit; None: they don't."""
    _, in_features, batch, row_tiles, units, *_ = sizes
    stream = stream_of(row_tiles, units, batch, layout, card)
    if stream is None:
        return None
    grid = {
        "COLUMNS": planes.product_for(batch, layout, card).columns,
        "WARPS": WARPS,
        "STAGES": STAGES,
        "TILES": stream.tiles,
        "MAIN": stream.main,
        "REST": stream.rest,
        "AHEAD": stream.ahead,
        "ALIGNED": int(in_features % 8 == 0),
        "EPILOGUE": planes.EPILOGUES[epilogue],
    }
    return KernelCall(
        file=NAME,
        kernel=NAME,
        constants=constants(dtype, **layout.macros, **grid),
        grid=(-(-row_tiles // stream.tiles), 1, 1),
        threads=WARPS * WARP,
        shared_bytes=stream.shared_bytes,
        numbers=(*sizes, 0, 0.0),
    )
