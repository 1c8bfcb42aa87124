"""How a card's blocks share the heads and the context of decode attention."""

from typing import NamedTuple

import torch

from qtool.runtime.backends.cuda.launch import LOAD_BYTES, RESERVED_BYTES, Card

MOST_HEADS = 8
"""Query heads of a block, at most: their sums fill the registers."""
MOST_DIMENSIONS = 1024
"""Of all heads of a block: their sums fill the shared memory."""
SHORTEST_PART = 64
"""Positions of a part of the context, at least: fewer aren't worth a merge."""
MOST_SPLITS = 64
BARRIERS = 16
"""Bytes, of a stage."""
BEGIN_AND_END = 176
"""What a block takes beside its positions, as so many of them: about 3 us of an H200."""
TILE_POSITIONS = 16
"""Positions of a product of tensor cores."""


class AttentionTuning(NamedTuple):
    """How the blocks of a multiprocessor read the cache, at most."""

    warps: int
    tiles: int
    """That a warp takes at a time."""
    stages: int
    """Of a warp's ring, each of that many tiles of keys and of values, of 128 dimensions."""
    resident: int
    """Blocks of a multiprocessor."""
    bulk: bool = False
    """The copy engine fills the rings, where the card has one."""


TUNED = {2: AttentionTuning(8, 1, 1, 2, bulk=True), 1: AttentionTuning(8, 2, 1, 2, bulk=True)}
"""By the bytes of a number in the cache."""
FEWEST_WARPS, MOST_STAGES, MEASURED_DIM = 4, 12, 128


class AttentionGrid(NamedTuple):
    """A block of decode attention."""

    macros: dict[str, int]
    warps: int
    shared_bytes: int


def attention_grid(card: Card, heads: int, head_dim: int, stored: torch.dtype) -> AttentionGrid:
    """Return the block for a cache of `stored`: rings as long as the card's shared memory allows.

    Args:
        card: Whose shared memory and copy engine there are.
        heads: Query heads of a block.
        head_dim: Dimensions of a head.
        stored: Of the cache: float16, bfloat16 or int8.
    """
    size = stored.itemsize
    tuning = TUNED[size]
    stage = (
        2 * tuning.tiles * TILE_POSITIONS * (head_dim * size + (4 if size == 1 else 0)) + BARRIERS
    )
    padded = -(-head_dim * size // (4 * LOAD_BYTES)) * 4 * LOAD_BYTES // size
    staged = 2 * heads * (padded // 64 * 64 + 32) + 4 * head_dim + 16
    room = (card.shared_bytes + RESERVED_BYTES) // tuning.resident - RESERVED_BYTES - staged
    # Where a warp couldn't ask ahead, fewer of them share the room.
    warps = tuning.warps if room >= min(2, tuning.stages) * tuning.warps * stage else FEWEST_WARPS
    most = min(tuning.stages * tuning.warps * MEASURED_DIM // (warps * head_dim), MOST_STAGES)
    stages = max(1, min(most, room // (warps * stage)))
    sums = 4 * warps * heads * (head_dim + 2)
    macros = {"HEAD_DIM": head_dim, "HEADS": heads, "SHORTEST": SHORTEST_PART, "WARPS": warps}
    macros |= {"TILES": tuning.tiles, "STAGES": stages, "RESIDENT": tuning.resident}
    macros["BULK"] = int(tuning.bulk and card.warpgroups and head_dim * size % LOAD_BYTES == 0)
    return AttentionGrid(macros, warps, staged + max(warps * stages * stage, sums))


def heads_per_block(group: int, head_dim: int) -> int:
    """Return how many query heads of a key-value head a block takes: as many as fit."""
    most = min(MOST_HEADS, MOST_DIMENSIONS // head_dim)
    return max(heads for heads in range(1, most + 1) if group % heads == 0)


def splits_for(card: Card, blocks: int, max_length: int) -> int:
    """Return into how many parts a context is cut: whole waves of blocks, and no empty ones.

    Waves are of one block per multiprocessor, although two fit: a second one took more for its
    beginning, end and merge than it won (78 us beside 73 at 65,536 positions, H200).
    """

    def positions(splits: int) -> float:
        """Of a multiprocessor, one after the other."""
        waves = -(-splits * blocks // card.multiprocessors)
        return waves * (max_length / splits + BEGIN_AND_END)

    useful = min(MOST_SPLITS, -(-max_length // SHORTEST_PART))
    return min(range(1, useful + 1), key=positions)
