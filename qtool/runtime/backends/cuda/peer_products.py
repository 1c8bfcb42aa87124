"""Products of ranks' columns, summed over ranks by the launch that makes them.

A sum of its own begins when the product has ended, and ends before the next begins: that takes
longer than a token's sums travel. So a block gives the others what it has as soon as it has it.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.runtime.backends.cuda import peer_memory, planes
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.launch import Card, KernelCall, Launch
from qtool.runtime.backends.cuda.linear_kernels import kernel_for
from qtool.runtime.backends.cuda.peer_sum import MOST_RANKS
from qtool.runtime.backends.cuda.plane_products import Around, call_for
from qtool.runtime.backends.cuda.selection import wanted_kernel
from qtool.runtime.tensor_parallel import TensorParallel

MOST_NUMBERS = 2**17
"""Of a result: sixteen tokens of 8192."""
NUMBER_BYTES = 8
"""A float and a mark."""


@dataclass(frozen=True, slots=True)
class Peers:
    """The ranks, and the memory through which their launches sum."""

    rank: int
    boxes: Tensor
    """(ranks,) int64, addresses of `peer_box_bytes` zeros that this rank may write to."""
    rounds: Tensor
    """(2,) int32, zeros at first: what kernels/peer_boxes.cuh counts."""


def peer_box_bytes(ranks: int) -> int:
    """Return the size of what each rank's peers write to: two rounds."""
    return 2 * ranks * MOST_NUMBERS * NUMBER_BYTES


@functools.cache
def peers_of(group: TensorParallel, card: Card) -> Peers | None:
    """Return what the launches of this rank need to sum; None, on all ranks: they can't.

    Every rank calls it. Cards that differ would choose different launches.
    """
    alike = len(set(group.gather_objects((card, wanted_kernel())))) == 1
    if not alike or group.world_size > MOST_RANKS:
        return None
    addresses = peer_memory.shared_zeros(group, peer_box_bytes(group.world_size))
    if isinstance(addresses, str):
        return None
    boxes = torch.tensor(addresses, dtype=torch.int64, device=group.device)
    return Peers(group.rank, boxes, torch.zeros(2, dtype=torch.int32, device=group.device))


def summed_product(
    x: Tensor,
    weight: KernelWeight,
    launch: Launch,
    card: Card,
    peers: Peers,
    residual: Tensor | None = None,
) -> Tensor | None:
    """Return the sum over ranks of x @ W.T, plus the residual, all in float32, rounded once.

    Args:
        x: (tokens, in_features) float16 or bfloat16, contiguous, this rank's.
        weight: This rank's columns; other ranks have as many.
        launch: Runs a kernel.
        card: Where.
        peers: The ranks.
        residual: (tokens, out_features), the same on all ranks.

    Returns:
        (tokens, out_features), the same bits on all ranks; None: it takes another kernel than that
        of bit planes, or more than one launch, or its blocks don't run all at once.
    """
    (tokens, inputs), rows = x.shape, weight.shape.out_features
    if not 0 < tokens * rows <= MOST_NUMBERS or weight.tiles is None:
        return None
    if kernel_for(weight, tokens, card) != "planes":
        return None
    row_tiles, units, *_ = weight.tiles.planes.shape
    sizes = (rows, inputs, tokens, row_tiles, units, weight.tiles.scales.shape[1], rows)
    around = Around("none" if residual is None else "residual", not weight.fresh)
    call = _call(sizes, weight.layout, x.dtype, card, around, (len(peers.boxes), peers.rank))
    if call is None:
        return None
    y = x.new_empty(tokens, rows)
    parts = (weight.tiles.planes, weight.tiles.scales)
    launch(call, (*parts, x, residual, y, peers.boxes, peers.rounds))
    return y


@functools.lru_cache(maxsize=4096)
def _call(
    sizes: planes.Sizes,
    layout: planes.Layout,
    dtype: torch.dtype,
    card: Card,
    around: Around,
    ranks: tuple[int, int],
) -> KernelCall | None:
    """Return the launch of a summed product, of (ranks, this rank); None: there is none."""
    plain = card._replace(warpgroups=False, counts_bits=False)  # no clusters, planes as bytes
    alone = call_for(sizes, layout, dtype, plain, around)
    (blocks, slabs, column_blocks), macros = alone.grid, dict(alone.constants)
    at_once = card.multiprocessors * macros["BLOCKS"]
    if slabs > 1 or blocks * column_blocks > at_once:
        return None
    name = f"{alone.kernel}_ranks"
    return alone._replace(
        file=name,
        kernel=name,
        constants=tuple(sorted({**macros, "RANKS": ranks[0]}.items())),
        numbers=(*sizes[:-1], ranks[1], MOST_NUMBERS),
    )
