"""One launch for weights of planes that share their inputs: classes of rows of unlike bits.

Each has blocks of its own beside those of the others, in proportion to the time that it takes, so
that all begin and end together (kernels/bit_plane_classes.cu; how blocks are shared is our design).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.runtime.backends.cuda import plane_plans, planes
from qtool.runtime.backends.cuda.grids import room_of, tunings_for
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.launch import WARP, Card, KernelCall, Launch, constants
from qtool.runtime.backends.cuda.plane_products import by_planes
from qtool.runtime.backends.cuda.planes import Layout, Product, Target
from qtool.runtime.backends.cuda.selection import Tuning
from qtool.runtime.backends.cuda.tiles import TILE_ROWS

MOST_CLASSES = 4
"""Of one launch: the kernel has arguments for so many."""
MOST_TOGETHER = 8
"""Tokens up to which one launch of products by planes is reckoned to beat several that look weights
up: those take 7 to 18 % less at 8 tokens, 13 to 41 % at 16, and 3 us more each."""
UNIT_WORK = 512
"""What a unit takes besides its bytes, as bytes: 128256 x 4096 at 2, 3 and 4 planes took 49, 64 and
78 us on an H200, so all that a unit has in common takes as long as a plane of it, 576 bytes."""
LEAST_STAGES = 2
"""Of a class. With CLASS_STAGES for all, one block per multiprocessor beats two: 128256 x 4096 on
an H200, rows of 4/2 bits, 58 us against 63; 4/3/2/1 bits 46 against 49; not 8/4/3/2, 71 against
67."""
CLASS_STAGES = 3
"""Of a class where there is room: what classes were timed with, whatever one weight takes."""


class RowClass(NamedTuple):
    """What decides the launch of one class."""

    rows: int
    row_tiles: int
    layout: Layout


class ClassSizes(NamedTuple):
    """What all classes share, as the kernel takes it."""

    in_features: int
    batch: int
    units: int
    groups: int
    width: int


@dataclass(frozen=True, slots=True)
class ClassesPlan:
    """How classes share one launch."""

    tuning: Tuning
    blocks: tuple[int, ...]
    """Of each class."""
    stages: tuple[int, ...]
    """Of each class."""
    shared_bytes: int

    @property
    def is_alone(self) -> bool:
        """Return whether no two blocks share a multiprocessor."""
        return self.tuning.per_multiprocessor == 1


def share_blocks(classes: Sequence[RowClass], units: int, blocks: int) -> tuple[int, ...]:
    """Return how many blocks each class gets, so that the last one to end ends soonest.

    A block takes a fixed time, which is the same for all, and for each of its units the time of
    the unit's bytes and of UNIT_WORK. A class has a block at least, and none without a unit.
    """
    counts = [1] * len(classes)

    def seconds(index: int) -> float:
        _, row_tiles, layout = classes[index]
        if counts[index] >= row_tiles * units:
            return 0.0  # another block would have nothing to do
        return (layout.stage_bytes + UNIT_WORK) * row_tiles * units / counts[index]

    for _ in range(blocks - len(classes)):
        slowest = max(range(len(classes)), key=seconds)
        counts[slowest] += seconds(slowest) > 0
    return tuple(counts)


@functools.cache
def plan_classes(
    classes: tuple[RowClass, ...], units: int, batch: int, card: Card
) -> ClassesPlan | None:
    """Choose a grid that fills a card once with all classes.

    None: they aren't to run together. Their groups differ, or one of them needs slabs of inputs, or
    so much shared memory that another would have fewer warps than by itself, or each by itself
    looks its weights up, and there are many tokens.
    """
    layouts = [its.layout for its in classes]
    product = planes.each_plane(batch, layouts[0])
    each = [
        plane_plans.tuned_plan(
            *(its.row_tiles, units, batch, its.layout),
            card=card,
            product=planes.each_plane(batch, its.layout),
        )
        for its in classes
    ]
    if len({layout.group for layout in layouts}) > 1:
        return None
    apart = all(planes.product_for(batch, layout, card).at_once for layout in layouts)
    if apart and batch > MOST_TOGETHER:
        return None
    if any(found is None or found[1].slabs > 1 for found in each):
        return None
    warps = max(tuning.warps * plan.per_multiprocessor for tuning, plan in filter(None, each))
    few = product.columns <= planes.MOST_IN_PAIRS
    tiles = sum(its.row_tiles for its in classes)
    tunings = [
        tuning
        for tuning in tunings_for(tiles, units, card, few=few, whole=False)
        if tuning.warps * tuning.per_multiprocessor >= warps
    ]
    deep = [replace(tuning, stages=max(tuning.stages, CLASS_STAGES)) for tuning in tunings]
    planned = [_fitted(classes, units, product, card, tuning) for tuning in deep]
    possible = [found for found in planned if found is not None]
    alone = [found for found in possible if found.is_alone and min(found.stages) > LEAST_STAGES]
    return next(iter(alone or possible), None)


def _fitted(
    classes: Sequence[RowClass], units: int, product: Product, card: Card, tuning: Tuning
) -> ClassesPlan | None:
    """Return the plan of one tuning, each class with the stages that there is room for."""
    total = max(len(classes), card.multiprocessors * tuning.per_multiprocessor)
    blocks = share_blocks(classes, units, total)
    room, stages, taken = room_of(card, tuning.per_multiprocessor), [], []
    for its, count in zip(classes, blocks, strict=True):
        share = -(-its.row_tiles * units // count)
        rest = product.shared_bytes(share, units, tuning.warps)
        stage = tuning.warps * its.layout.stage_bytes
        stages.append(min(tuning.stages, (room - rest) // stage))
        taken.append(rest + stages[-1] * stage)
    if min(stages) < LEAST_STAGES:
        return None
    return ClassesPlan(tuning, blocks, tuple(stages), max(taken))


@functools.lru_cache(maxsize=4096)
def classes_call(
    classes: tuple[RowClass, ...],
    sizes: ClassSizes,
    dtype: torch.dtype,
    card: Card,
    dependent: bool = True,  # noqa: FBT001, FBT002 - a key of the cache
) -> KernelCall | None:
    """Return the one launch of several classes, decided once; None: they run one by one."""
    planned = plan_classes(classes, sizes.units, sizes.batch, card) if len(classes) > 1 else None
    if planned is None:
        return None
    first, tuning = classes[0].layout, planned.tuning
    product = planes.each_plane(sizes.batch, first)
    macros = {"GROUP": first.group, "CLASSES": len(classes), "COLUMNS": product.columns}
    macros |= {"BYTES": int(product.name == planes.AS_BYTES), "EPILOGUE": 0, **planes.PLAIN_LAUNCH}
    macros |= {"WARPS": tuning.warps, "BLOCKS": tuning.per_multiprocessor}
    for number, (its, stages) in enumerate(zip(classes, planned.stages, strict=True)):
        own = {"PLANES": its.layout.planes, "OFFSET": its.layout.offset, "STAGES": stages}
        macros |= {f"{name}_{number}": value for name, value in own.items()}
    each = [(its.rows, its.row_tiles, n) for its, n in zip(classes, planned.blocks, strict=True)]
    each += [(0, 0, 0)] * (MOST_CLASSES - len(classes))
    blocks, columns = sum(planned.blocks), -(-sizes.batch // product.columns)
    return KernelCall(
        file="bit_plane_classes",
        kernel="bit_plane_classes",
        constants=constants(dtype, **macros, ALIGNED=int(sizes.in_features % 8 == 0)),
        grid=(blocks, 1, columns),
        threads=tuning.warps * WARP,
        shared_bytes=planned.shared_bytes,
        numbers=(*sizes, *chain.from_iterable(each)),
        zeros=columns * blocks * tuning.warps * TILE_ROWS * product.columns,
        dependent=dependent,
    )


def by_classes(
    x: Tensor,
    parts: Sequence[tuple[KernelWeight, Tensor]],
    y: Tensor,
    launch: Launch,
    card: Card,
) -> None:
    """Write x @ W.T of several weights by their tiles, together where that is possible.

    Where it isn't, the first is multiplied by itself: it needs the most shared memory.

    Args:
        x: (tokens, in_features) float16 or bfloat16, contiguous and aligned; one token at least.
        parts: Weights, by descending width, and the columns of y that their rows are:
            (out_features,) int32.
        y: (tokens, width) in the dtype of `x`.
        launch: Runs a kernel.
        card: Where.
    """
    while parts:
        call, tensors = _call_of(x, parts[:MOST_CLASSES], y, card)
        if call is None:
            weight, places = parts[0]
            by_planes(x, weight, launch, card, target=Target(y, places))
        else:
            launch(call, (x, y, *tensors))
        parts = parts[1 if call is None else MOST_CLASSES :]


def _call_of(
    x: Tensor, parts: Sequence[tuple[KernelWeight, Tensor]], y: Tensor, card: Card
) -> tuple[KernelCall | None, tuple[Tensor | None, ...]]:
    """Return the launch of at most MOST_CLASSES weights, and their tensors."""
    classes, tensors = [], []
    units = groups = 0
    for weight, places in parts:
        assert weight.tiles is not None
        packed = weight.tiles
        row_tiles, units = packed.planes.shape[:2]
        groups = packed.scales.shape[1]
        classes.append(RowClass(weight.shape.out_features, row_tiles, weight.layout))
        tensors += [packed.planes, packed.scales, places]
    batch, inputs = x.shape
    sizes = ClassSizes(inputs, batch, units, groups, y.shape[1])
    dependent = not any(weight.fresh for weight, _ in parts)
    call = classes_call(tuple(classes), sizes, x.dtype, card, dependent)
    return call, (*tensors, *[None] * (3 * (MOST_CLASSES - len(parts))))
