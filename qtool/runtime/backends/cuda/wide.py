"""Products of many tokens from bit planes on compute capability 9.0: kernels/bit_plane_wgmma.cu."""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtool.runtime.backends.cuda.launch import Card, KernelCall, Launch, constants
from qtool.runtime.backends.cuda.planes import (
    CENTERED,
    EPILOGUES,
    STEP_BYTES,
    Layout,
    Target,
    table_bytes,
)
from qtool.runtime.backends.cuda.selection import WIDE_COLUMNS, WideTuning, selection_for
from qtool.runtime.backends.cuda.tiles import TILE_ROWS, UNIT, Tiles
from qtool.scheme import Shape2D

WARPGROUP = 128
BLOCK_INPUTS = 64
SHARE_BYTES = 32
"""What a CTA notes of the stream."""
Y_STRIDE = 72
STAGES_OF_X, STAGES_OF_WEIGHTS = 8, 4
"""At most; of weights with one unit each."""
MOST_LOOKED_UP = 3
"""Planes of equal steps: kernels/bit_plane_weights.cuh."""
MOST_UNITS = 2**23
"""Of all tiles: the kernel multiplies them by CTAs in 32 bits."""


def has_codes(layout: Layout) -> bool:
    """Return whether weights are codes times steps; those of three planes are looked up sooner."""
    return layout.offset == CENTERED and layout.planes > MOST_LOOKED_UP


@dataclass(frozen=True, slots=True)
class Rings:
    """How many stages a CTA has, and what it takes of shared memory."""

    of_weights: int
    of_x: int
    shared_bytes: int


def slice_tokens(columns: int) -> int:
    """Return how many tokens of a tile its CTAs share out: a slice, that one of them sums."""
    return 32 if columns % 32 == 0 and columns > 96 else 16  # noqa: PLR2004 - AT_ONCE


@functools.cache
def rings_for(layout: Layout, tuning: WideTuning, room: int) -> Rings | None:
    """Return the deepest rings that fit into `room` bytes of shared memory; None: none do."""
    row_tiles = 4 * tuning.groups
    weights = row_tiles * layout.stage_bytes * tuning.w_units
    each = STEP_BYTES if has_codes(layout) else table_bytes(layout.planes)
    tables = row_tiles * layout.span * TILE_ROWS * each
    fixed = SHARE_BYTES + tables + tuning.groups * slice_tokens(tuning.columns) * Y_STRIDE * 2
    stage_of_x = tuning.x_blocks * tuning.columns * BLOCK_INPUTS * 2
    best = None
    for of_weights in range(2, STAGES_OF_WEIGHTS // tuning.w_units + 1):
        left = room - fixed - of_weights * (weights + 16)
        of_x = min(STAGES_OF_X, left // (stage_of_x + 16))
        if of_x < 3 or (best is not None and of_x < 4):  # noqa: PLR2004
            break  # with two, products wait; more of x are worth more than more of the weights
        shared = fixed + of_weights * (weights + 16) + of_x * (stage_of_x + 16)
        best = Rings(of_weights, of_x, shared)
    return best


@functools.lru_cache(maxsize=4096)
def tuned_wide(
    tokens: int, out_features: int, units: int, layout: Layout, card: Card
) -> WideTuning | None:
    """Return how to launch: as the card's selection says, or as near to it as there is room.

    None: the card has no `wgmma`, or too little shared memory.
    """
    selection, equal_steps = selection_for(card.name), layout.offset == CENTERED
    asked = selection.wide_tuning(tokens, out_features, layout.planes, equal_steps=equal_steps)
    fits = (c for c in reversed(WIDE_COLUMNS) if c <= asked.columns)
    fewer = [asked, *(replace(asked, groups=g, fine=False) for g in (2, 1))]
    tries = (replace(tuning, columns=c) for c in fits for tuning in fewer)
    roomy = (tuning for tuning in tries if rings_for(layout, tuning, card.shared_bytes))
    stream = units * -(-tokens // asked.columns) * -(-out_features // 64)
    return next(roomy, None) if card.warpgroups and stream < MOST_UNITS else None


def ctas_for(tiles: int, units: int, card: Card) -> int:
    """Return the CTAs that share tiles of so many units, all of which run at once.

    As many for every tile where that takes no more units of one: then none has parts of two.
    """
    most = min(tiles * units, card.multiprocessors)
    each = most // tiles
    even = each > 0 and -(-units // each) <= -(-tiles * units // most)
    return tiles * each if even else most


WideSizes = tuple[int, int, int, int, int, int, int]
"""out_features, in_features, tokens, row tiles, units, groups and columns of the result."""


def _macros(tuning: WideTuning, rings: Rings) -> dict[str, int]:
    """Return those of how to launch."""
    return {
        "COLUMNS": tuning.columns,
        "GROUPS": tuning.groups,
        "W_STAGES": rings.of_weights,
        "X_STAGES": rings.of_x,
        "X_BLOCKS": tuning.x_blocks,
        "W_UNITS": tuning.w_units,
        "FINE": int(tuning.fine),
        "MIRRORED": int(tuning.mirrored),
    }


@functools.lru_cache(maxsize=4096)
def wide_call(  # noqa: PLR0913 - a key of the cache
    sizes: WideSizes,
    layout: Layout,
    dtype: torch.dtype,
    card: Card,
    tuning: WideTuning,
    *,
    epilogue: str = "none",
    dependent: bool = True,
) -> KernelCall | None:
    """Return the launch of a product; None: a CTA has too little shared memory."""
    out_features, in_features, tokens, row_tiles, units, groups, width = sizes
    rings = rings_for(layout, tuning, card.shared_bytes)
    if rings is None:
        return None
    token_tiles = -(-tokens // tuning.columns)
    tiles = -(-row_tiles // (4 * tuning.groups)) * token_tiles
    macros = {**_macros(tuning, rings), "EPILOGUE": EPILOGUES[epilogue]}
    ctas = ctas_for(tiles, units, card)
    slices = tuning.columns // slice_tokens(tuning.columns)
    return KernelCall(
        file="bit_plane_wgmma",
        kernel="bit_plane_wgmma",
        constants=constants(dtype, ALIGNED=int(in_features % 8 == 0), **layout.macros, **macros),
        grid=(ctas, 1, 1),
        threads=(tuning.groups + 1) * WARPGROUP,
        shared_bytes=rings.shared_bytes,
        numbers=(out_features, in_features, tokens, row_tiles, units, groups, width, token_tiles),
        zeros=1 + 2 * ctas * tuning.groups * slices,
        dependent=dependent,
        together=True,
        one_architecture=True,
    )


def multiply_wide(  # noqa: PLR0913 - what, by what, where, how, and what comes after
    x: Tensor,
    packed: Tiles,
    shape: Shape2D,
    layout: Layout,
    launch: Launch,
    card: Card,
    *,
    tuning: WideTuning,
    target: Target,
    epilogue: str = "none",
    residual: Tensor | None = None,
    dependent: bool = True,
) -> None:
    """Write x @ W.T to a target.

    Args:
        x: (tokens, in_features) float16 or bfloat16, contiguous, aligned to 16 bytes.
        packed: W.
        shape: Of W.
        layout: Of W.
        launch: Runs a kernel.
        card: Where.
        tuning: How.
        target: (tokens, width), and where each row goes.
        epilogue: Of `planes.EPILOGUES`.
        residual: As `target`, added to the product.
        dependent: Weights may be read before the launch before has ended.
    """
    tokens, inputs = x.shape
    row_tiles, units, *_ = packed.planes.shape
    sizes = (
        shape.out_features,
        inputs,
        tokens,
        row_tiles,
        units,
        packed.scales.shape[1],
        target.width,
    )
    call = wide_call(
        *(sizes, layout, x.dtype, card, tuning), epilogue=epilogue, dependent=dependent
    )
    assert call is not None
    padded = -(-tokens // tuning.columns) * tuning.columns
    ordered = x.new_empty(padded * units * UNIT)
    sums = 2 * call.grid[0] * tuning.columns * 64 * tuning.groups
    parts = x.new_empty(sums, dtype=torch.float32)
    written = (residual, target.y, target.places, parts)
    tensors = (packed.planes, packed.scales, x, ordered, *written)
    launch(call, tensors)
