"""The grid, the shared memory and the arguments of the kernels for groups along out_features."""

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from qtool.errors import BackendError
from qtool.runtime.backends.cuda.grids import room_of, shares_of
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.launch import WARP, Card, KernelCall, Launch, constants
from qtool.runtime.backends.cuda.panels import PanelLayout
from qtool.runtime.backends.cuda.plane_products import NOTHING_AROUND, Around
from qtool.runtime.backends.cuda.planes import EPILOGUES, MORE_WAVES, NUMBER, Target
from qtool.runtime.backends.cuda.tiles import TILE_ROWS
from qtool.runtime.decode.ops import Norm

PLANE_BYTES, LIMB_BYTES = 512, 1024
"""Of a plane of 16 rows x 256 inputs; of 256 numbers as four bytes each."""
MOST_AS_BYTES = 2
"""That are multiplied as bytes."""
DEQUANTIZE_THREADS, DEQUANTIZE_WARPS = 128, 4
MOST_STEPS = 2**24
"""Tiles times units: the kernel divides their numbers in float32."""
PanelRings = tuple[tuple[int, int, int], ...]
RINGS: PanelRings = ((12, 3, 1), (16, 2, 1), (12, 2, 1), (8, 3, 1), (8, 2, 1))
"""Warps, tiles of a warp in shared memory, CTAs that share a multiprocessor: the best first."""
SMALL_STEPS, SMALL_RINGS = 160, ((8, 4, 1), (8, 3, 1), (8, 2, 1))
"""Of tiles times units per multiprocessor: with fewer, what warps exchange costs more than they
hide."""
SMALLEST_STEPS = 64
"""With fewer, a second CTA takes tokens nine to sixteen."""
WHOLE_RINGS = ((16, 3, 1), (12, 3, 1), (8, 3, 1), (8, 2, 1))
"""Where a CTA has whole tiles: fewer warps make no exchange smaller."""
MOST_WARPS, MOST_REGISTERS = (16, 12), (6, 32)
"""Of a CTA; planes times columns up to which the most have registers enough, as bytes and else."""
SHORT_RINGS = ((4, 2, 1), (2, 2, 1))
"""For cards, or weights, that those leave no room for."""


class PanelProduct(NamedTuple):
    """One of the kernels that differ in how a tile is multiplied."""

    name: str
    columns: int
    """Tokens that one CTA multiplies with each weight that it reads."""
    operand_bytes: int
    """Of shared memory of a warp: inputs and scales of one unit, staged."""
    most_warps: int


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
    whole: bool
    """CTAs have whole tiles, the same number but for the last ones, and exchange nothing."""
    chunk: int
    """Of a panel, the most tiles that a CTA has."""


def panel_products(batch: int, layout: PanelLayout, *, each: int) -> tuple[PanelProduct, ...]:
    """Return the kernels that multiply so many tokens, the best first.

    Args:
        batch: Tokens.
        layout: Of the weight.
        each: Tiles times units per multiprocessor.
    """

    def most_warps(columns: int, enough: int) -> int:
        return MOST_WARPS[layout.planes * columns > enough]

    of_bytes, of_halves = MOST_REGISTERS
    if batch <= MOST_AS_BYTES:
        operands = layout.planes * batch * LIMB_BYTES + 16
        return (PanelProduct("bit_panel_imma", batch, operands, most_warps(batch, of_bytes)),)
    scales = (layout.planes + (layout.offset != 0)) * PLANE_BYTES
    wanted = (8,) if batch <= 8 or each < SMALLEST_STEPS else (16, 8)  # noqa: PLR2004 - a tile's
    return tuple(
        PanelProduct(
            "bit_panel_mma",
            columns,
            columns * (PLANE_BYTES + NUMBER) + scales,
            most_warps(columns, of_halves),
        )
        for columns in wanted
    )


@functools.cache
def plan_panels(
    panels: int, units: int, batch: int, layout: PanelLayout, *, card: Card
) -> PanelPlan | None:
    """Choose a grid that fills a card once; None: a CTA has too little shared memory."""
    of_tile, row_tiles = units * layout.sets, panels * layout.tiles
    steps = row_tiles * of_tile
    if steps >= MOST_STEPS:
        return None
    each = steps // card.multiprocessors
    products = panel_products(batch, layout, each=each)
    whole = shares_of(row_tiles, of_tile, of_tile, card.multiprocessors)[2]
    best: PanelRings = SMALL_RINGS if each < SMALL_STEPS else RINGS
    if whole and batch <= MOST_AS_BYTES:
        best = WHOLE_RINGS
    ways = (itertools.product(MORE_WAVES, products, rings) for rings in (best, SHORT_RINGS))
    for waves, product, ring in itertools.chain.from_iterable(ways):
        warps, stages, per = ring
        if warps > product.most_warps:
            continue
        most = card.multiprocessors * per * waves
        ctas, share, whole = shares_of(row_tiles, of_tile, of_tile, most, per)
        chunk, own = layout.tiles, -(-share // (of_tile * layout.tiles)) + 1
        if whole:
            chunk = min(layout.tiles, share // of_tile)
            own = -(-(share // of_tile - 1) // layout.tiles) + 1
        part = layout.sets * chunk * TILE_ROWS * product.columns
        of_warp = stages * layout.planes * PLANE_BYTES + product.operand_bytes
        numbers = own + warps * product.columns  # which warps have parts of a panel; squares
        shared = warps * of_warp + (1 + own + warps) * part * NUMBER + numbers * NUMBER
        if shared <= room_of(card, per):
            words = -(-batch // product.columns) * ctas * warps * part
            return PanelPlan(product, warps, stages, per, ctas, shared, words, whole, chunk)
    return None


PanelSizes = tuple[int, int, int, int, int, int, int, int]
"""out_features of a set, in_features, tokens, panels, units, columns of the result, rows of a group
and panels of a group, as the kernels take them."""


@functools.lru_cache(maxsize=4096)
def panel_call(
    sizes: PanelSizes,
    layout: PanelLayout,
    dtype: torch.dtype,
    card: Card,
    around: Around = NOTHING_AROUND,
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
        "WHOLE": int(chosen.whole),
        "CHUNK": chosen.chunk,
        "NORM": int(around.norm_eps is not None),
        "EPILOGUE": EPILOGUES[around.epilogue],
    }
    return KernelCall(
        file=chosen.product.name,
        kernel=chosen.product.name,
        constants=constants(dtype, **layout.macros, **grid),
        grid=(chosen.ctas, -(-batch // chosen.product.columns), 1),
        threads=chosen.warps * WARP,
        shared_bytes=chosen.shared_bytes,
        numbers=(*sizes, float(around.norm_eps or 0)),
        dependent=around.dependent,
        zeros=chosen.exchange_words,
    )


def panel_kernel(weight: KernelWeight, tokens: int, card: Card) -> str:
    """Return the name of the kernel that multiplies so many tokens, few enough for planes."""
    assert weight.panels is not None
    panels, units = weight.panels.planes.shape[:2]
    planned = plan_panels(panels, units, tokens or 1, weight.panel_layout, card=card)
    return "dequantize" if planned is None else "planes"


def by_panels(  # noqa: PLR0913 - as `linear_kernels.matmul`
    x: Tensor,
    weight: KernelWeight,
    launch: Launch,
    card: Card,
    *,
    residual: Tensor | None = None,
    gated: bool = False,
    target: Target | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """Do `linear_kernels.matmul` by planes; x is aligned to 16 bytes. `target` has no places.

    Raises:
        BackendError: a CTA has too little shared memory.
    """
    packed, rows = weight.panels, weight.shape.out_features
    assert packed is not None
    outputs = rows // packed.sets
    target = target or Target(x.new_empty(len(x), outputs))
    panels, units = packed.planes.shape[:2]
    sizes = (outputs, x.shape[1], len(x), panels, units, target.width)
    epilogue = "gated" if gated else "none" if residual is None else "residual"
    cut = (packed.group_rows, packed.of_group)
    gains, eps = norm or (None, None)
    around = Around(epilogue, not weight.fresh, eps)
    call = panel_call((*sizes, *cut), weight.panel_layout, x.dtype, card, around)
    launch(call, (packed.planes, packed.scales, x, residual, target.y, gains))
    return target.y


def by_dense_panels(
    x: Tensor,
    weight: KernelWeight,
    launch: Launch,
    card: Card,
    *,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """Do `linear_kernels.matmul` by a dequantized weight and torch's product."""
    del card
    y = functional.linear(x, dense_panels(weight, launch))
    if gated:
        gate, up = y.chunk(2, dim=-1)
        return functional.silu(gate) * up
    return y if residual is None else y + residual


def dense_panels(weight: KernelWeight, launch: Launch) -> Tensor:
    """Return W, (out_features, in_features) in the dtype of the activations.

    Of gate and up, all rows of gate come first.
    """
    packed, (rows, inputs) = weight.panels, weight.shape
    assert packed is not None
    panels, units, sets, count = packed.planes.shape[:4]
    dense = torch.empty(rows, inputs, dtype=weight.dtype, device=packed.planes.device)
    sizes = (rows // sets, inputs, panels, units, packed.group_rows, packed.of_group)
    blocks = -(-panels * units * sets * count // DEQUANTIZE_WARPS)
    call = _dense_call("panel_dequantize", sizes, blocks, weight.panel_layout, weight.dtype)
    tensors = (packed.planes, packed.scales, dense)
    launch(call._replace(dependent=False) if weight.fresh else call, tensors)
    return dense


def rows_of_panels(index: Tensor, weight: KernelWeight, launch: Launch) -> Tensor:
    """Return the rows that `index` names: (*index.shape, in_features); NaN where there is none."""
    packed, (rows, inputs) = weight.panels, weight.shape
    assert packed is not None
    flat = index.flatten().to(torch.int64).contiguous()
    found = torch.empty(len(flat), inputs, dtype=weight.dtype, device=flat.device)
    sizes = (rows, inputs, packed.planes.shape[1], packed.group_rows, packed.of_group)
    call = _dense_call("panel_rows", sizes, len(flat), weight.panel_layout, weight.dtype)
    if len(flat):
        launch(call, (packed.planes, packed.scales, flat, found))
    return found.view(*index.shape, inputs)


@functools.lru_cache(1024)  # not all lengths of prompts for ever
def _dense_call(
    kernel: str, sizes: tuple[int, ...], blocks: int, layout: PanelLayout, dtype: torch.dtype
) -> KernelCall:
    macros, grid = constants(dtype, **layout.macros), (blocks, 1, 1)
    return KernelCall("panel_dequantize", kernel, macros, grid, DEQUANTIZE_THREADS, 0, sizes)
