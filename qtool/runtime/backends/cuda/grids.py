"""How many CTAs share a weight of row tiles, and what each of them has."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qtool.runtime.backends.cuda.launch import RESERVED_BYTES, Card
from qtool.runtime.backends.cuda.selection import ALL_STAGES, Tuning, selection_for
from qtool.runtime.backends.cuda.tiles import UNIT

MOST_IDLE = 8
"""Units that a multiprocessor may lack, on average, so that CTAs have whole tiles: an exchange
costs about a microsecond, twice what they do at 3 planes and one token."""
MORE_WAVES = (1, 2, 4, 8)
FEWER_WARPS = (7, 3)
"""For cards, or weights, that the measured ones leave no room for."""


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """One launch on one card."""

    column_blocks: int
    ctas: int
    """Per slab and block of columns."""
    slabs: int
    units_per_slab: int
    stages: int
    per_multiprocessor: int
    shared_bytes: int
    exchange_words: int
    whole: bool
    """CTAs have whole tiles, the same number but for the last ones, and exchange nothing."""
    cluster: int = 1
    """CTAs of a cluster, each with a slab of its own: then `slabs` is 1, for nothing is left to
    add."""
    early: int = ALL_STAGES
    """Of `stages`, what a warp asks for before there are inputs."""

    @property
    def macros(self) -> dict[str, int]:
        """Return what the constants of the kernel say about it."""
        found = {"STAGES": self.stages, "BLOCKS": self.per_multiprocessor, "WHOLE": int(self.whole)}
        found |= {"EARLY": self.early} if self.early < self.stages - 1 else {}
        return found | ({"CLUSTER": self.cluster} if self.cluster > 1 else {})


def room_of(card: Card, ctas: int) -> int:
    """Return the shared memory of each of so many CTAs that share a multiprocessor."""
    return (card.shared_bytes + RESERVED_BYTES) // ctas - RESERVED_BYTES


def max_clusters(card: Card, cluster: int) -> int:
    """Return how many clusters of so many CTAs a card runs at once, one CTA per multiprocessor.

    Those of 4 and 8 leave some multiprocessors over: an H200, of 132, has 30 and 15 of them.
    """
    usable = card.multiprocessors if cluster <= 2 else card.multiprocessors * 11 // 12  # noqa: PLR2004
    return max(1, usable // cluster)


def shares_of(
    row_tiles: int, count: int, shortest: int, most: int, beside: int = 1, *, whole: bool = False
) -> tuple[int, int, bool]:
    """Return how many CTAs, of `most`, share a slab, units of the largest share, and if it's tiles.

    Args:
        row_tiles: Of the weight.
        count: Units of a tile, in the longest slab.
        shortest: The same in the shortest one.
        most: CTAs.
        beside: CTAs on a multiprocessor.
        whole: CTAs have whole tiles, however many stay idle.
    """
    most = max(1, most)
    tiles = -(-row_tiles // most)
    if whole or beside * (tiles * count - row_tiles * count / most) <= MOST_IDLE:
        return -(-row_tiles // tiles), tiles * count, True
    ctas = min(most, row_tiles * shortest)
    return ctas, -(-row_tiles * count // ctas), False


def rings_of(tuning: Tuning) -> Iterator[tuple[int, int]]:
    """Yield stages and CTAs per multiprocessor, the best first."""
    for ctas in range(tuning.per_multiprocessor, 0, -1):
        for stages in range(tuning.stages, 2 if ctas > 1 else 1, -1):
            yield stages, ctas


def tunings_for(
    row_tiles: int, units: int, card: Card, *, few: bool, whole: bool = True
) -> tuple[Tuning, ...]:
    """Return what the card's selection says, then what is as near to it; `few` tokens or not.

    `whole`: CTAs may have whole tiles, which two beside one another don't improve.
    """
    selection = selection_for(card.name)
    asked = selection.alone
    if few and not (whole and shares_of(row_tiles, units, units, card.multiprocessors)[2]):
        asked = selection.tuning(units * UNIT, row_tiles * units // card.multiprocessors)
    fewer = [replace(selection.alone, warps=warps) for warps in FEWER_WARPS]
    return tuple(dict.fromkeys((asked, selection.alone, *fewer)))
