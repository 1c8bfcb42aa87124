"""How kernels for groups along out_features share a card: which one, its grid and its memory."""

import functools
import itertools
import math
from typing import NamedTuple

from qtool.runtime.backends.cuda.grids import MORE_WAVES, room_of, shares_of
from qtool.runtime.backends.cuda.launch import Card
from qtool.runtime.backends.cuda.panels import PanelLayout
from qtool.runtime.backends.cuda.planes import NUMBER
from qtool.runtime.backends.cuda.tiles import TILE_ROWS

PLANE_BYTES, LIMB_BYTES = 512, 1024
"""Of a plane of 16 rows x 256 inputs; of 256 numbers as four bytes each."""
MOST_AS_BYTES = 2
"""That are multiplied as bytes."""
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
MOST_WHOLE = 8
"""Tiles of a CTA whose warps stage for themselves: with more they would all stage at the same time,
again and again."""
FEWEST_ONCE, SMALL_ONCE = 16, 160
ONCE_RINGS = (((8, 4), (8, 2)), ((16, 2), (12, 2)), ((16, 3), (16, 2), (12, 3), (12, 2)))
"""Warps and tiles of a warp where a CTA stages all units of its tiles once: with fewer tiles times
units than the first number, than the second, and with more."""
MOST_WARPS, MOST_REGISTERS = (16, 12), (4, 32)
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


def panel_products(
    batch: int, layout: PanelLayout, *, each: int, whole: bool = False
) -> tuple[PanelProduct, ...]:
    """Return the kernels that multiply so many tokens, the best first.

    Args:
        batch: Tokens.
        layout: Of the weight.
        each: Tiles times units per multiprocessor.
        whole: CTAs have whole tiles.
    """

    def most_warps(columns: int, enough: int) -> int:
        return MOST_WARPS[layout.planes * columns > enough]

    of_bytes, of_halves = MOST_REGISTERS
    if batch <= MOST_AS_BYTES:
        operands = layout.planes * batch * LIMB_BYTES + 16
        return (PanelProduct("bit_panel_imma", batch, operands, most_warps(batch, of_bytes)),)
    scales = (layout.planes + (layout.offset != 0)) * PLANE_BYTES
    few = batch <= 8 or (each < SMALLEST_STEPS and not whole)  # noqa: PLR2004 - a tile's
    wanted = (8,) if few else (16, 8)
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
    whole = _shares(row_tiles, of_tile, card.multiprocessors, 1)[2]
    products = panel_products(batch, layout, each=each, whole=whole)
    if batch <= MOST_AS_BYTES:
        once = _plan_once(row_tiles, of_tile, products[0], layout, card)
        if once is not None:
            return once
    best: PanelRings = RINGS if whole or each >= SMALL_STEPS else SMALL_RINGS
    if whole and batch <= MOST_AS_BYTES:
        best = WHOLE_RINGS
    ways = (itertools.product(MORE_WAVES, products, rings) for rings in (best, SHORT_RINGS))
    for waves, product, ring in itertools.chain.from_iterable(ways):
        warps, stages, per = ring
        if warps > product.most_warps:
            continue
        most = card.multiprocessors * per * waves
        ctas, share, whole = _shares(row_tiles, of_tile, most, per)
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


def _shares(row_tiles: int, of_tile: int, most: int, per: int) -> tuple[int, int, bool]:
    """Do `shares_of` with whole tiles only for CTAs of few."""
    found = shares_of(row_tiles, of_tile, of_tile, most, per)
    if not found[2] or found[1] <= MOST_WHOLE * of_tile:
        return found
    ctas = min(most, row_tiles * of_tile)
    return ctas, -(-row_tiles * of_tile // ctas), False


def _plan_once(
    row_tiles: int, of_tile: int, product: PanelProduct, layout: PanelLayout, card: Card
) -> PanelPlan | None:
    """Plan CTAs of whole tiles that stage all of their units once; None: there is no room."""
    most = card.multiprocessors
    ctas, share, whole = shares_of(row_tiles, of_tile, of_tile, most)
    tiles = share // of_tile
    even = math.gcd(tiles, layout.tiles) if row_tiles % ctas == 0 else 1  # of where a CTA begins
    panels = -(-(layout.tiles - even + tiles) // layout.tiles)
    for warps, stages in ONCE_RINGS[(share >= FEWEST_ONCE) + (share >= SMALL_ONCE)]:
        parts = (tiles * layout.sets + warps) * TILE_ROWS * product.columns
        numbers = tiles * layout.sets + warps * product.columns
        ring = warps * stages * layout.planes * PLANE_BYTES
        shared = ring + panels * of_tile * product.operand_bytes + (parts + numbers) * NUMBER
        if whole and warps <= product.most_warps and shared <= room_of(card, 1):
            once = product._replace(name="bit_panel_tiles")
            return PanelPlan(once, warps, stages, 1, ctas, shared, 0, whole, layout.tiles)
    return None
