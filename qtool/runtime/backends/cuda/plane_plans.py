"""How the bit-plane kernels are launched: grids, rings of weights, and what is asked for when."""

import functools
from dataclasses import replace

from qtool.runtime.backends.cuda.grids import (
    MORE_WAVES,
    LaunchPlan,
    max_clusters,
    rings_of,
    room_of,
    shares_of,
    tunings_for,
)
from qtool.runtime.backends.cuda.launch import Card
from qtool.runtime.backends.cuda.planes import (
    AS_BITS,
    AS_BYTES,
    CENTERED,
    LOW_PLANES,
    MOST_IN_PAIRS,
    MOST_LOADS,
    Layout,
    Product,
    product_for,
)
from qtool.runtime.backends.cuda.selection import BLOCK, FEW_INPUTS, Tuning
from qtool.runtime.backends.cuda.tiles import TILE_ROWS, UNIT

MAX_UNITS = 2**21
"""Of a slab: the kernel divides their numbers in float32."""
ENOUGH_WARPS = 12
"""For all planes at once, where more want another slab: 113 us, not 140, at 57344 x 8192, 3 planes
and 16 tokens on an H200."""
LOOKED_UP_WAYS = [(w, c) for cs in ((1, 2), (8,)) for w in (32, ENOUGH_WARPS) for c in cs]
"""Most warps and CTAs of a cluster, the best first. Clusters spare slabs whose sums another launch
adds; of 4 or 8 they leave a tenth of the card over, which costs more at 4096 x 14336 and 4 planes.
More than BLOCK tokens have bit_plane_wgmma.cu instead."""
LARGEST_CLUSTER = 8
LONG_TO_STAGE, MANY_UNITS = 8192, 4
"""Of a slab, whose staging takes long; of a warp, which then waits for memory."""


@functools.cache
def plan_launch(  # noqa: PLR0913 - a key of the cache
    row_tiles: int,
    units: int,
    batch: int,
    layout: Layout,
    *,
    card: Card,
    tuning: Tuning,
    product: Product,
) -> LaunchPlan | None:
    """Choose a grid that fills a card once; None: a CTA has too little shared memory.

    in_features are cut into slabs only where the inputs of all of them don't fit into shared
    memory, and by clusters into as many as they have CTAs.
    """
    columns, warps = product.columns, tuning.warps
    blocks = -(-batch // columns)
    together = tuning.cluster
    for slabs in range(1, units + 1) if together == 1 else (together,):
        count = -(-units // slabs)
        if (slabs - 1) * count >= units or row_tiles * count > MAX_UNITS:
            continue  # the last slab would be empty
        shortest = units - (slabs - 1) * count
        if together > 1 and (shortest < count or not card.warpgroups):
            return None  # they add what lies in the same places, and only some cards have them
        for stages, ctas_per in rings_of(tuning):
            most = max_clusters(card, together) * ctas_per * tuning.waves // (slabs // together)
            ctas, share, whole = shares_of(
                row_tiles, count, shortest, most, ctas_per, whole=together > 1
            )
            ring = warps * stages * product.stage_bytes(layout)
            shared = ring + product.shared_bytes(share, count, warps)
            if shared <= room_of(card, ctas_per):
                words = blocks * slabs * ctas * warps * TILE_ROWS * columns
                sizes = (blocks, ctas, slabs // together, count, stages, ctas_per, shared, words)
                return LaunchPlan(*sizes, whole, together, tuning.early)
    return None


@functools.cache
def tuned_plan(  # noqa: PLR0913 - a key of the cache
    row_tiles: int,
    units: int,
    batch: int,
    layout: Layout,
    *,
    card: Card,
    product: Product | None = None,
    normed: bool = False,
) -> tuple[Tuning, LaunchPlan] | None:
    """Return how to launch: as the card's selection says, or as near to it as there is room.

    Nearest is, for few tokens, what needs no slabs, then what leaves as many CTAs beside one
    another as it should, then what has more warps; for many tokens, what has more warps. None: a
    CTA of this card can't hold one unit and its inputs. `product`: None for `product_for`.
    `normed`: CTAs norm their inputs.
    """
    product = product or product_for(batch, layout, card)
    few = product.columns <= MOST_IN_PAIRS
    tunings = tunings_for(row_tiles, units, card, few=few)
    sizes = (row_tiles, units, batch, layout)
    asked = ahead_of(tunings[0], product, layout, (row_tiles, units), card, normed=normed)
    ways = ways_of(asked, layout, product)
    tunings = (*ways, *tunings[1:])
    for waves in MORE_WAVES:  # each leaves less to sum up at the end of a CTA
        found = []
        for order, tuning in enumerate(replace(tuning, waves=waves) for tuning in tunings):
            planned = plan_launch(*sizes, card=card, tuning=tuning, product=product)
            if planned is not None:
                crowded = planned.per_multiprocessor < tuning.per_multiprocessor
                # with many tokens a CTA multiplies for longer: all its warps are worth a slab
                rank = (planned.slabs, crowded, order) if few else (crowded, order, planned.slabs)
                if product.at_once:
                    rank = (order >= len(ways), planned.slabs, order)
                found.append((rank, (tuning, planned)))
        if found:
            return min(found, key=lambda pair: pair[0])[1]
    return None


def ahead_of(
    asked: Tuning,
    product: Product,
    layout: Layout,
    tiles: tuple[int, int],
    card: Card,
    *,
    normed: bool,
) -> Tuning:
    """Return how a product of few tokens asks for weights ahead, as was the fastest.

    What is asked for before there are inputs is in front of them in memory's queue; the rest of a
    ring comes behind them, while they are staged. More of it is worth its room as far as memory is
    what a warp waits for: where instructions are few, units many, or a norm comes first. Where a
    warp would stage more units than it can norm, two CTAs stage a half each, and add up their sums.

    Args:
        asked: With a ring of two stages, as the card's selection has it.
        product: Which kernel.
        layout: Of the weight.
        tiles: Row tiles of the weight, and units of a row.
        card: Where.
        normed: CTAs norm their inputs.
    """
    if product.name not in (AS_BYTES, AS_BITS) or asked.per_multiprocessor > 1:
        return asked
    row_tiles, units = tiles
    codes, fast = layout.offset == CENTERED, layout.planes < LOW_PLANES
    each = row_tiles * units / (card.multiprocessors * asked.warps)
    more, early, cluster = 0, 1, 1
    if card.warpgroups and units * product.columns > MOST_LOADS * asked.warps:
        more, cluster = 2 if codes or product.columns == 1 else 1, 2
    elif codes:
        more = 2
    elif product.name == AS_BYTES:
        early = 0 if units * UNIT > FEW_INPUTS and not fast else 1
    elif units * UNIT > LONG_TO_STAGE:
        more, early = 2, 0 if fast else 1
    elif normed or (fast and each > MANY_UNITS):
        more = 2 if normed else 1
    return replace(asked, stages=asked.stages + more, early=early, cluster=cluster)


def ways_of(asked: Tuning, layout: Layout, product: Product) -> list[Tuning]:
    """Return how weights that are multiplied at once are launched, the best first; else `asked`."""
    if not product.looks_up:
        fewer = replace(asked, warps=ENOUGH_WARPS)
        first = [] if product.columns > BLOCK else [asked]  # sixteen warps lack registers for more
        if asked.cluster > 1:
            first.append(replace(asked, cluster=1))
        return [*first, fewer] if product.at_once else first
    most = 1 if product.columns > BLOCK else 2 if layout.planes == LOW_PLANES else LARGEST_CLUSTER
    return [
        replace(asked, warps=min(warps, asked.warps), cluster=cluster)
        for warps, cluster in LOOKED_UP_WAYS
        if cluster <= most
    ]
