"""The grid of bit_plane_lookup_stream.cu: CTAs of about as many row tiles as warps."""

from typing import NamedTuple

import torch

from qtool.runtime.backends.cuda import planes
from qtool.runtime.backends.cuda.launch import WARP, Card, KernelCall, constants
from qtool.runtime.backends.cuda.tiles import TILE_ROWS

NAME = "bit_plane_lookup_stream"
WARPS, STAGES, AHEAD = 16, 2, 2
LEAST_TILES = 12
"""Of a CTA: fewer leave units to other warps whose inputs all have to stay in shared memory."""


class Stream(NamedTuple):
    """How CTAs share a weight."""

    tiles: int
    """Of a CTA, one per warp; the other warps help."""
    main: int
    """Units of a tile that its own warp multiplies."""
    rest: int
    """Those that other warps do."""


def stream_of(row_tiles: int, units: int, multiprocessors: int) -> Stream | None:
    """Return how many tiles a CTA has so that all have as many; None: too few for its warps."""
    waves = -(-row_tiles // (multiprocessors * WARPS))
    tiles = -(-row_tiles // (multiprocessors * waves))
    if tiles < LEAST_TILES:
        return None
    main = tiles * units // WARPS
    return Stream(tiles, main, units - main)


def shared_bytes(stream: Stream, layout: planes.Layout, columns: int) -> int:
    """Return what a CTA takes of shared memory."""
    ring = WARPS * STAGES * planes.looked_up(columns).stage_bytes(layout)
    x = (2 * AHEAD + stream.rest) * planes.BLOCKS_PER_UNIT * columns * planes.looked_up(1).x_bytes
    slots = WARPS - 1 if stream.tiles < WARPS else 0
    return ring + x + slots * TILE_ROWS * columns * planes.NUMBER + 2 * AHEAD * 8


def streamed_call(
    sizes: planes.Sizes, layout: planes.Layout, dtype: torch.dtype, card: Card, epilogue: str
) -> KernelCall | None:
    """Return the launch of a product whose inputs come unit by unit; None: not of this weight."""
    _, in_features, batch, row_tiles, units, *_ = sizes
    stream = stream_of(row_tiles, units, card.multiprocessors)
    columns = -(-batch // 8) * 8
    if stream is None or not card.warpgroups or columns > 64 or stream.main < AHEAD:
        return None
    shared = shared_bytes(stream, layout, columns)
    if shared > planes.room_of(card, 1):
        return None
    grid = {
        "COLUMNS": columns,
        "WARPS": WARPS,
        "STAGES": STAGES,
        "AHEAD": AHEAD,
        "TILES": stream.tiles,
        "MAIN": stream.main,
        "REST": stream.rest,
        "ALIGNED": int(in_features % 8 == 0),
        "EPILOGUE": planes.EPILOGUES[epilogue],
    }
    return KernelCall(
        file=NAME,
        kernel=NAME,
        constants=constants(dtype, **layout.macros, **grid),
        grid=(-(-row_tiles // stream.tiles), 1, 1),
        threads=WARPS * WARP,
        shared_bytes=shared,
        numbers=sizes,
    )
