"""One launch for products of one token that follow one another: kernels/bit_plane_chain.cu.

A launch per product begins and ends in about 3 us, in which no weight is read. In a chain the
planes of the products to come are asked for all the time, and a product begins when its inputs are
there: blocks wait for one another within the launch (our design).
"""

import functools
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from qtool import settings
from qtool.runtime.backends.cuda import planes
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.launch import WARP, Card, KernelCall, Launch, constants
from qtool.runtime.backends.cuda.planes import BLOCKS_PER_UNIT, NUMBER, Layout
from qtool.runtime.backends.cuda.selection import wanted_kernel
from qtool.runtime.backends.cuda.tiles import TILE_ROWS, UNIT
from qtool.runtime.decode.ops import Norm
from qtool.runtime.decode.weights import DecoderLayer

MOST_LINKS, WARPS = 4, 16
CHAIN_STAGES, FEWEST_STAGES = 8, 3
"""Units of a warp in shared memory, at most and at least."""
HELD = 0
"""Stages that are asked for only when the inputs of a product are there."""
LINK_BYTES = 72
"""Of shared memory, for what the kernel keeps of a product."""
X_BYTES = 128
"""Of shared memory for 32 inputs, as bit_plane_imma.cuh stages them."""
NONE, GIVEN = 0, 1
"""Residuals of a link; 2 and more: what that link has made."""


class Link(NamedTuple):
    """A product of a chain, of what the one before it has made."""

    weight: KernelWeight
    norm: Norm | None = None
    gated: bool = False
    residual: int = NONE
    """NONE, GIVEN or 2 + the number of a link at least two before this one."""
    wanted: bool = False
    """Its result is one of the chain's; else only the next link reads it."""


class LinkSizes(NamedTuple):
    """What decides the launch of one link, as the kernel takes it."""

    row_tiles: int
    units: int
    groups: int
    outputs: int
    gated: int
    residual: int


class ChainPlan(NamedTuple):
    """One launch of several products."""

    stages: int
    loads: int
    most_tiles: int
    stride: int
    """Words of 64 bits for what a link has made."""
    shared_bytes: int


@functools.cache
def plan_chain(sizes: tuple[LinkSizes, ...], layout: Layout, card: Card) -> ChainPlan | None:
    """Return how products are chained on a card; None: they can't be."""
    if not 2 <= len(sizes) <= MOST_LINKS or layout.group % 64 != 0:  # noqa: PLR2004 - words of 64
        return None
    units, tiles = max(its.units for its in sizes), max(its.row_tiles for its in sizes)
    most_tiles, loads = -(-tiles // card.multiprocessors), -(-units // WARPS)
    if loads > planes.MOST_LOADS or any(its.outputs % 8 for its in sizes):
        return None
    inputs = units * (BLOCKS_PER_UNIT * (X_BYTES + NUMBER) + NUMBER) + WARPS * NUMBER
    sums = (most_tiles + WARPS) * TILE_ROWS * NUMBER + len(sizes) * most_tiles * NUMBER
    rest = -(-LINK_BYTES * len(sizes) // 16) * 16 + inputs + sums
    stage = WARPS * layout.stage_bytes
    stages = min(CHAIN_STAGES, (planes.room_of(card, 1) - rest) // stage)
    if stages < FEWEST_STAGES:
        return None
    stride = -(-max(its.outputs for its in sizes) // UNIT) * (UNIT // 2)
    return ChainPlan(stages, loads, most_tiles, stride, rest + stages * stage)


@functools.lru_cache(maxsize=4096)
def chain_call(  # noqa: PLR0913, PLR0917 - a key of the cache
    sizes: tuple[LinkSizes, ...],
    in_features: int,
    layout: Layout,
    dtype: torch.dtype,
    card: Card,
    eps: float,
    dependent: bool = True,  # noqa: FBT001, FBT002
) -> KernelCall | None:
    """Return the launch of a chain, decided once; None: its products run one by one."""
    planned = plan_chain(sizes, layout, card)
    if planned is None or in_features % 8 != 0:
        return None
    macros = {**layout.macros, "LINKS": len(sizes), "HELD": min(HELD, planned.stages - 2)}
    macros |= {"WARPS": WARPS, "BLOCKS": 1, "STAGES": planned.stages, "COLUMNS": 1, "ALIGNED": 1}
    macros |= {"LOADS": planned.loads, "NORM": planned.loads, "MOST_TILES": planned.most_tiles}
    blocks, empty = card.multiprocessors, LinkSizes(0, 0, 0, 0, 0, 0)
    filled = (*sizes, *[empty] * (MOST_LINKS - len(sizes)))
    return KernelCall(
        file="bit_plane_chain",
        kernel="bit_plane_chain",
        constants=constants(dtype, **macros),
        grid=(blocks, 1, 1),
        threads=WARPS * WARP,
        shared_bytes=planned.shared_bytes,
        numbers=(in_features, planned.stride, float(eps), *chain.from_iterable(filled)),
        dependent=dependent,
        words=-(-blocks // 32) * 32 + (len(sizes) - 1) * planned.stride,
    )


def run_chain(
    x: Tensor, residual: Tensor | None, links: Sequence[Link], launch: Launch, card: Card
) -> list[Tensor] | None:
    """Return what the links that are wanted make; None: they run one by one.

    Args:
        x: (1, in_features of the first link) float16 or bfloat16, aligned.
        residual: (1, outputs of the links that add it), or None.
        links: Products, each of the outputs of the one before.
        launch: Runs a kernel.
        card: Where.
    """
    sizes, tensors, made = [], [], []
    for link in links:
        packed = link.weight.tiles
        if packed is None or link.weight.layout != links[0].weight.layout:
            return None
        row_tiles, units = packed.planes.shape[:2]
        outputs = link.weight.shape.out_features // (2 if link.gated else 1)
        groups, gated = packed.scales.shape[1], int(link.gated)
        sizes.append(LinkSizes(row_tiles, units, groups, outputs, gated, link.residual))
        y = x.new_empty(1, outputs) if link.wanted else None
        gains = None if link.norm is None else link.norm.weight
        tensors += [packed.planes, packed.scales, gains, y]
        made += [] if y is None else [y]
    (eps,) = {link.norm.eps for link in links if link.norm is not None} or {0.0}
    dependent = not any(link.weight.fresh for link in links)
    layout = links[0].weight.layout
    call = chain_call(tuple(sizes), x.shape[1], layout, x.dtype, card, float(eps), dependent)
    if call is None:
        return None
    tensors += [None] * (4 * (MOST_LINKS - len(links)))
    launch(call, (x, residual, *tensors))
    return made


def is_chained() -> bool:
    """Return whether a decoding step runs by chains where it can; not if a kernel was asked for."""
    return wanted_kernel() is None and settings.chains()


def links_after_attention(
    layer: DecoderLayer, following: DecoderLayer | None, eps: float
) -> list[Link] | None:
    """Return the products from a block's attention to the next one's; None: not all are planes."""
    projections = [layer.output, layer.gate_up, layer.down, *([following.qkv] if following else [])]
    weights = [one for one in projections if isinstance(one, KernelWeight) and one.tiles]
    if len(weights) < len(projections):
        return None
    links = [
        Link(weights[0], residual=GIVEN),
        Link(weights[1], Norm(layer.mlp_norm, eps), gated=True),
        Link(weights[2], residual=2, wanted=True),
    ]
    if following is not None:
        links.append(Link(weights[3], Norm(following.input_norm, eps), wanted=True))
    return links
