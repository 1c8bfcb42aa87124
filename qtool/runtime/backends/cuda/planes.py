"""The bit-plane kernels: which multiplies what, its shared memory and its arguments."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from qtool.runtime.backends.cuda.launch import WARP, Card
from qtool.runtime.backends.cuda.selection import (
    BLOCK,
    LOOKED_UP,
    MORE_TOKENS,
    MOST_AS_CODES,
)
from qtool.runtime.backends.cuda.tiles import TILE_ROWS, UNIT

BLOCKS_PER_UNIT = 8
NUMBER = 4
"""Bytes of a float32 in shared memory."""
MOST_LOADS, MOST_LOADS_LOOKED_UP = 4, 8
"""Units of inputs that a warp holds in registers; the same where weights are looked up."""
LOW_PLANES = 4
"""Planes of the first table of kernels/bit_plane_lookup.cuh; the rest has one of its own."""
AS_BYTES, AS_BITS = "bit_plane_imma", "bit_plane_bmma"
MOST_AS_LIMBS, MOST_PLANES_OF_MORE = 4, 4
"""Tokens up to which x is multiplied as bytes, as timed: registers are for two of more planes."""
CENTERED, STEP_BYTES = 2, 8
"""`Layout.offset` of equal steps, and what one of them and its zero point take where
bit_plane_wgmma.cu keeps them in place of tables."""
MOST_COUNTED, GROUPS_COUNTED = 4, 128
"""Planes up to which bits of one token are counted, and what groups are multiples of there."""
LEAST_GROUP = 64
"""Of weights that are looked up: smaller ones make too many tables."""
COLUMN_BLOCKS = (8, BLOCK, MORE_TOKENS)
MOST_IN_PAIRS = 2
"""Columns up to which two CTAs beside one another are worth it: they stage all inputs twice."""
PLAIN_LAUNCH = {"WHOLE": 0, "NORM": 0, "LOADS": MOST_LOADS}
"""Constants of a launch whose CTAs share tiles, and know x as it is multiplied."""
EPILOGUES = {"none": 0, "residual": 1, "gated": 2}


class Layout(NamedTuple):
    """What the constants of the kernel say about a weight."""

    planes: int
    group: int
    """Inputs per group; whole units where one group is the row."""
    offset: int
    """0: none; 1: beside the scales; 2: the center of an affine weight in its place."""

    @property
    def macros(self) -> dict[str, int]:
        """Return the constants themselves."""
        return {"PLANES": self.planes, "GROUP": self.group, "OFFSET": self.offset}

    @property
    def parameters(self) -> int:
        """Return how many numbers a row and group has."""
        return self.planes + (self.offset != 0)

    @property
    def span(self) -> int:
        """Return how many groups a unit may touch."""
        if self.group % UNIT == 0:
            return 1
        if UNIT % self.group == 0:
            return UNIT // self.group
        return (self.group - 32 + UNIT - 1) // self.group + 1

    @property
    def stage_bytes(self) -> int:
        """Return what one unit takes: planes, and the scales of all groups that it touches."""
        return self.planes * WARP * 16 + self.span * 32 * self.parameters


def table_bytes(planes: int) -> int:
    """Return what the tables of one row and group take of shared memory."""
    low, more = min(planes, LOW_PLANES), max(0, planes - LOW_PLANES)
    return sum(8 * {4: 4, 3: 2}.get(count, 1) for count in (low, more) if count)


@dataclass(frozen=True, slots=True)
class Product:
    """One of the kernels that differ in how a unit is multiplied."""

    name: str
    columns: int
    """Tokens that one CTA multiplies with each weight that it reads."""
    x_bytes: int
    """Of shared memory for 32 inputs of one token."""
    unscaled: bool = False
    """It keeps no sums and no scales of x, or keeps them beside its operands."""
    looks_up: bool = False
    """It makes tables where a unit's planes were."""

    @property
    def at_once(self) -> bool:
        """Return whether all planes are one product of many tokens: a weight takes little time."""
        return self.unscaled and self.columns > 1

    @property
    def most_loads(self) -> int:
        """Return how many units of inputs a warp has under way before it stages the first."""
        return MOST_LOADS_LOOKED_UP if self.looks_up else MOST_LOADS

    def stage_bytes(self, layout: Layout) -> int:
        """Return what a unit takes of shared memory."""
        tables = layout.span * TILE_ROWS * table_bytes(layout.planes) if self.looks_up else 0
        return max(0, tables - layout.planes * WARP * 16) + layout.stage_bytes

    def shared_bytes(self, share: int, units: int, warps: int) -> int:
        """Return what a CTA takes of shared memory for so many units, of rows of `units`.

        That is the inputs, and sums of all tiles that it may have; not the units themselves.
        """
        own = (share + units - 1) // units + 1
        number = 0 if self.unscaled else NUMBER
        inputs = units * self.columns * (BLOCKS_PER_UNIT * (self.x_bytes + number) + number)
        sums = (own + 1 + warps) * TILE_ROWS * self.columns * NUMBER
        return inputs + sums + own * NUMBER


def product_for(batch: int, layout: Layout, card: Card) -> Product:
    """Return the fastest kernel: bits or bytes for few tokens, else weights of 16 bit."""
    if layout.offset == CENTERED:
        few = batch <= MOST_AS_CODES.get(layout.planes, 2) and layout.group % 64 == 0
        return as_bytes(batch) if few else by_codes(batch)
    few = layout.planes <= MOST_COUNTED and layout.group % GROUPS_COUNTED == 0
    if card.counts_bits and batch == 1 and few:
        return Product(AS_BITS, 1, 136, unscaled=True)
    first = LOOKED_UP.get(layout.planes)
    if first is None or batch < first or layout.group < LEAST_GROUP:
        return each_plane(batch, layout)
    return looked_up(batch)


def looked_up(batch: int) -> Product:
    """Return the kernel that looks weights of up to four planes up and multiplies once."""
    return Product("bit_plane_lookup_mma", _columns(batch), 64, unscaled=True, looks_up=True)


def by_codes(batch: int) -> Product:
    """Return the kernel that multiplies codes of equal steps."""
    columns = 1 if batch == 1 else _columns(batch)
    return Product("bit_plane_codes_mma", columns, 64, unscaled=True)


def as_bytes(batch: int) -> Product:
    """Return the kernel that multiplies planes, or codes of four, as bytes."""
    return Product(AS_BYTES, 1 << (batch - 1).bit_length(), 128)


def _columns(batch: int) -> int:
    """Return how many tokens a CTA multiplies that has one product for all planes."""
    return next((count for count in COLUMN_BLOCKS if batch <= count), BLOCK)


def each_plane(batch: int, layout: Layout) -> Product:
    """Return the kernel that multiplies planes with the least arithmetic: as bytes, or float16."""
    most = MOST_AS_LIMBS if layout.planes <= MOST_PLANES_OF_MORE else 2
    if batch <= most and layout.group % 64 == 0:
        return as_bytes(batch)
    columns = 1 if batch == 1 else 8 if batch <= 8 else 16  # noqa: PLR2004 - tiles of eight columns
    return Product("bit_plane_mma", columns, 64)


Sizes = tuple[int, int, int, int, int, int, int]
"""out_features, in_features, tokens, row tiles, units, groups and columns of the result, as the
kernels take them."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a product goes."""

    y: Tensor  # (tokens, columns), in the dtype of the activations; may be columns of a wider one
    places: Tensor | None = None  # (rows of the weight,) int32: their columns of y; None: all

    @property
    def width(self) -> int:
        """Return how far apart the outputs of two tokens lie."""
        return self.y.stride(0)
