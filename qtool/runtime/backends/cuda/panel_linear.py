"""The grid, the shared memory and the arguments of the kernels for groups along out_features."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.errors import BackendError
from qtool.runtime.backends.cuda.launch import WARP, Card, KernelCall, Launch, constants
from qtool.runtime.backends.cuda.panels import PanelLayout, Panels
from qtool.runtime.backends.cuda.planes import EPILOGUES, MAX_UNITS, NUMBER, room_of
from qtool.runtime.backends.cuda.tiles import TILE_ROWS

PLANE_BYTES, LIMB_BYTES = 512, 1024
"""Of a plane of 16 rows x 256 inputs; of 256 numbers as four bytes each."""
FEW_TOKENS = 2
"""That are multiplied as bytes."""
RINGS = ((16, 3, 1), (16, 2, 1), (12, 3, 1), (12, 2, 1), (8, 3, 1), (8, 2, 1), (4, 2, 1), (2, 2, 1))
"""Warps, tiles of a warp in shared memory, CTAs that share a multiprocessor: the best first."""


class PanelProduct(NamedTuple):
    """One of the kernels that differ in how a tile is multiplied."""

    name: str
    columns: int
    """Tokens that one CTA multiplies with each weight that it reads."""
    operand_bytes: int
    """Of shared memory of a warp: inputs and scales of one unit, staged."""


class PanelPlan(NamedTuple):
    """One launch on one card."""

    product: PanelProduct
    warps: int
    stages: int
    per_multiprocessor: int
    ctas: int
    """Per block of columns."""
    shared_bytes: int
    exchange_words: int


def panel_products(batch: int, layout: PanelLayout) -> tuple[PanelProduct, ...]:
    """Return the kernels that multiply so many tokens, the best first."""
    if batch <= FEW_TOKENS:
        operands = layout.planes * batch * LIMB_BYTES + 16
        return (PanelProduct("bit_panel_imma", batch, operands),)
    scales = (layout.planes + (layout.offset != 0)) * PLANE_BYTES
    wanted = (8,) if batch <= 8 else (16, 8)  # noqa: PLR2004 - tiles of eight columns
    return tuple(
        PanelProduct("bit_panel_mma", columns, columns * (PLANE_BYTES + NUMBER) + scales)
        for columns in wanted
    )


@functools.cache
def plan_panels(
    panels: int, units: int, batch: int, layout: PanelLayout, *, card: Card
) -> PanelPlan | None:
    """Choose a grid that fills a card once; None: a CTA has too little shared memory."""
    steps = panels * units * layout.sets * layout.tiles
    for product in panel_products(batch, layout):
        part = layout.sets * layout.tiles * TILE_ROWS * product.columns
        for warps, stages, per in RINGS:
            ctas = max(1, min(card.multiprocessors * per, steps))
            share = -(-steps // ctas)
            own = -(-share // (units * layout.sets * layout.tiles)) + 1
            ring = warps * (stages * layout.planes * PLANE_BYTES + product.operand_bytes)
            shared = ring + (1 + own + warps) * part * NUMBER + own * NUMBER
            if shared <= room_of(card, per) and steps < MAX_UNITS * 8:
                words = -(-batch // product.columns) * ctas * warps * part
                return PanelPlan(product, warps, stages, per, ctas, shared, words)
    return None


Sizes = tuple[int, int, int, int, int, int, int, int]
"""out_features of a set, in_features, tokens, panels, units, columns of the result, rows of a group
and panels of a group, as the kernels take them."""


@functools.lru_cache(maxsize=4096)
def panel_call(
    sizes: Sizes, layout: PanelLayout, dtype: torch.dtype, card: Card, epilogue: str = "none"
) -> KernelCall:
    """Return the launch of a product, decided once for all weights of one shape.

    Raises:
        BackendError: a CTA has too little shared memory.
    """
    _, in_features, batch, panels, units, *_ = sizes
    chosen = plan_panels(panels, units, batch, layout, card=card)
    if chosen is None:
        raise BackendError(
            f"A block of this card has {card.shared_bytes} bytes of shared memory: too few for a "
            f"weight of {layout.planes} planes in panels of {layout.tiles} tiles. "
            "QTOOL_KERNEL=dequantize runs it."
        )
    grid = {
        "COLUMNS": chosen.product.columns,
        "WARPS": chosen.warps,
        "STAGES": chosen.stages,
        "BLOCKS": chosen.per_multiprocessor,
        "ALIGNED": int(in_features % 8 == 0),
        "EPILOGUE": EPILOGUES[epilogue],
    }
    return KernelCall(
        file=chosen.product.name,
        kernel=chosen.product.name,
        constants=constants(dtype, **layout.macros, **grid),
        grid=(chosen.ctas, -(-batch // chosen.product.columns), 1),
        threads=chosen.warps * WARP,
        shared_bytes=chosen.shared_bytes,
        numbers=sizes,
        zeros=chosen.exchange_words,
    )


def multiply_panels(  # noqa: PLR0913 - what, by what, where, and what comes after
    x: Tensor,
    packed: Panels,
    layout: PanelLayout,
    out_features: int,
    launch: Launch,
    card: Card,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """Return x @ W.T, or silu(gate) * up of rows that alternate.

    Args:
        x: (tokens, in_features) float16 or bfloat16, contiguous, aligned to 16 bytes.
        packed: W.
        layout: What the kernels are compiled for.
        out_features: Of the result: of a set, where there are two.
        launch: Runs a kernel.
        card: Where.
        residual: (tokens, out_features), added to the product of one set.

    Returns:
        (tokens, out_features) in the dtype of `x`.

    Raises:
        BackendError: a CTA has too little shared memory.
    """
    y = x.new_empty(len(x), out_features)
    panels, units = packed.planes.shape[:2]
    sizes = (out_features, x.shape[1], len(x), panels, units, out_features)
    epilogue = "gated" if packed.sets > 1 else "none" if residual is None else "residual"
    rows = (packed.group_rows, packed.of_group)
    call = panel_call((*sizes, *rows), layout, x.dtype, card, epilogue)
    launch(call, (packed.planes, packed.scales, x, residual, y))
    return y
