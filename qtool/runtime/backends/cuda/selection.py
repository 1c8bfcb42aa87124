"""Which kernel runs how many tokens, and how it is tuned: measured, per card.

What `qtool bench --tune` found on a card comes first (`selection_file`). A card that wasn't
measured is run as the first that is here. Which selection is in use stands in `qtool doctor` and in
what `qtool bench --gpu` prints; $QTOOL_KERNEL and `--kernel` override it.
"""

import functools
from dataclasses import dataclass
from math import prod

from qtool import settings
from qtool.plugins import check_name
from qtool.scheme import Shape2D

KERNELS = ("planes", "lut", "wide", "dequantize", "sign_flip")
"""bit_plane_*.cu; lut_gemm.cu; bit_plane_wgmma.cu; dequantize.cu and torch's product;
sign_flip.cu."""

BLOCK = 16
"""Tokens that one CTA multiplies at most."""

WIDE_COLUMNS = (16, 32, 48, 64, 96, 128, 192, 256)
"""Tokens that a CTA of bit_plane_wgmma.cu multiplies at once: one compiled kernel each."""

LOOKED_UP = {2: 5, 3: 3, 4: 3}
"""Tokens from which on weights of so many planes are looked up, as timed on an H200; a single plane
has one product per weight either way."""

MORE_TOKENS = 24
"""The same of looked-up weights, or those of equal steps, on cards without bit_plane_wgmma.cu."""

MOST_AS_CODES = {2: 4, 3: 4}
"""Tokens up to which codes of equal steps, of so many bits, are multiplied as bytes; else 2."""

FEW_INPUTS = 4096
"""Up to which a token is staged soon enough for what is tried there."""

STORED_KERNELS = ("lut", "sign_flip")
"""Those that read a weight as a checkpoint stores it."""


ALL_STAGES = 32
"""More than a ring has."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """What changes the time of the bit-plane kernels and nothing else."""

    warps: int
    stages: int
    """Units of a warp in shared memory, one of them in use."""
    per_multiprocessor: int = 1
    """CTAs that share one."""
    waves: int = 1
    """CTAs that follow one another on one."""
    cluster: int = 1
    """CTAs that have a slab of inputs each and add up their sums in shared memory."""
    early: int = ALL_STAGES
    """Units that a warp asks for before there are inputs; for the rest of its stages behind them,
    which memory then gives it first."""


@dataclass(frozen=True, slots=True)
class WideTuning:
    """What changes the time of bit_plane_wgmma.cu and nothing else."""

    columns: int
    """Tokens that a CTA multiplies at once: a multiple of 16, at most 256."""
    groups: int = 2
    """Warpgroups of a CTA, each of 64 outputs."""
    x_blocks: int = 1
    """Blocks of 64 inputs that are copied at once: 1 or 2."""
    w_units: int = 1
    """Units of weights that are copied at once: 1 or 2."""
    fine: bool = False
    """Weights are looked up for one product at a time, not for four."""
    mirrored: bool = False
    """Four planes are looked up as three and a sign, then their center is added in 16 bit."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What was fastest on one card; how it was measured: kernels/README.md."""

    measured_on: str
    most_products: int
    """Tokens times planes up to which the bit planes, in blocks of 16 tokens, are faster than a
    dequantized weight and torch's product."""
    least_weights: int
    """Of fewer, the dequantized one stays in the L2 cache: more than one block isn't worth it."""
    tables: range
    """Weights from which on the LUT kernel multiplies one token sooner than the bit planes, and
    bits up to which it does; of two planes and more. Empty: it never does."""
    wide: tuple[range, ...]
    """Tokens that bit_plane_wgmma.cu multiplies sooner than all others do, by planes: of 1, of 2,
    and so on, the last of more. Beyond, one dequantized weight serves many tokens."""
    wide_of_few: tuple[range, ...]
    """The same for fewer than `least_weights`."""
    most_groups: int
    """Outputs from which on four warpgroups are worth more than two, up to 64 tokens."""
    alone: Tuning
    pairs: Tuning
    """Two CTAs cover for one another where inputs are few, so staged soon, and weights are many."""

    def tuning(self, in_features: int, units: int) -> Tuning:
        """Return how the bit-plane kernels are launched; each multiprocessor does so many units."""
        few_inputs, many_weights = in_features <= FEW_INPUTS, units >= 100  # noqa: PLR2004
        return self.pairs if few_inputs and many_weights else self.alone

    def prefers_tables(self, planes: int, shape: Shape2D) -> bool:
        """Return whether the LUT kernel is the fastest for one token; it isn't with many inputs."""
        if not self.tables or planes == 1 or shape.in_features > FEW_INPUTS:
            return False
        return self.tables.start <= prod(shape) <= self.tables.stop // planes

    def most_tokens(self, planes: int, weights: int = 2**63, *, equal_steps: bool = False) -> int:
        """Return how many tokens the bit planes of so many weights multiply."""
        blocks = self.most_products // planes // BLOCK if weights >= self.least_weights else 1
        return max(MORE_TOKENS if equal_steps or planes in LOOKED_UP else BLOCK, blocks * BLOCK)

    def is_wide(
        self, planes: int, tokens: int, shape: Shape2D, *, equal_steps: bool = False
    ) -> bool:
        """Return whether bit_plane_wgmma.cu is the fastest, on a card that runs it."""
        if equal_steps and tokens <= BLOCK:
            # where not all inputs of more than eight tokens fit, and weights are many
            many = shape.out_features >= self.most_groups and shape.in_features > FEW_INPUTS
            return many and tokens > BLOCK // 2
        measured = self.wide if prod(shape) >= self.least_weights else self.wide_of_few
        if equal_steps and planes == 4:  # noqa: PLR2004 - as long as three planes
            planes = 3
        return tokens in measured[min(planes, len(measured)) - 1]

    def wide_tuning(
        self, tokens: int, out_features: int, planes: int, *, equal_steps: bool = False
    ) -> WideTuning:
        """Return how bit_plane_wgmma.cu is launched; more than four planes weren't all timed."""
        tiles = -(-tokens // WIDE_COLUMNS[-1])
        columns = next(count for count in WIDE_COLUMNS if count * tiles >= tokens)
        few = columns <= 64  # noqa: PLR2004 - more sums leave no room
        roomy = columns <= (128 if planes <= 4 else 64)  # noqa: PLR2004 - for two blocks of x
        many = out_features >= self.most_groups
        groups = 4 if few and many and columns != 48 else 2  # noqa: PLR2004
        return WideTuning(
            columns,
            groups,
            x_blocks=2 if roomy else 1,
            w_units=2 if planes <= (4 if many or (few and equal_steps) else 3 if few else 0) else 1,
            fine=groups == 4 and planes > 4,  # noqa: PLR2004
            # with more tokens, products take longer
            mirrored=few and planes == 4 and not equal_steps,  # noqa: PLR2004
        )

    def __str__(self) -> str:
        """Say what is chosen, for people."""
        tables = ""
        if self.tables:
            weights, bits = self.tables.start / 1e6, self.tables.stop / 1e6
            tables = (
                f"lut for one token of {weights:.0f} million weights and more, {bits:.0f} million "
                "bits at most; "
            )
        three, four = (f"{r.start} to {r.stop - 1}" for r in self.wide[2:4])
        return (
            f"planes up to {BLOCK} tokens, and from {self.least_weights // 10**6} million weights "
            f"on up to {self.most_tokens(2)} / {self.most_tokens(3)} / {self.most_tokens(4)} at "
            f"2 / 3 / 4 bits; {tables}with wgmma, wide for {three} / {four} tokens "
            f"at 3 / 4 bits; dequantize beyond (measured on {self.measured_on})"
        )


H100 = Selection(
    measured_on="NVIDIA H100 80GB HBM3",
    most_products=160,
    least_weights=2**25,
    tables=range(1, 1),  # none, since blocks have whole tiles
    # Timed on an NVIDIA H200 at 2, 3, 4 and 8 planes. Reckoned: 1 as 2 from 17 tokens on, 5 to 7
    # as 8.
    wide=(*[range(17, 1025)] * 4, range(16, 513)),
    wide_of_few=(*[range(17, 1025)] * 4, range(16, 257)),
    most_groups=24576,
    alone=Tuning(warps=16, stages=2),
    pairs=Tuning(warps=8, stages=4, per_multiprocessor=2),
)
SELECTIONS = (H100,)


_TRIED: dict[str, Selection] = {}


def card_to_try(name: str, selection: Selection) -> str:
    """Return a name for a card that is run by `selection`, whatever its own name would give."""
    tried = f"{name} (trial {len(_TRIED) + 1})"
    _TRIED[tried] = selection
    return tried


@functools.cache
def selection_for(card_name: str) -> Selection:
    """Return the selection of a card; of one that wasn't measured, the first.

    Raises:
        BackendError: the card's tuning table can't be read.
    """
    from qtool.runtime.backends.cuda.selection_file import read_selection

    if card_name in _TRIED:
        return _TRIED[card_name]
    found = read_selection(card_name) if card_name else None
    known = (s for s in SELECTIONS if s.measured_on == card_name)
    return found or next(known, SELECTIONS[0])


def wanted_kernel() -> str | None:
    """Return the kernel that $QTOOL_KERNEL asks for; None: choose.

    Raises:
        UnknownNameError: there is no such kernel.
    """
    name = settings.kernel()
    if name is not None:
        check_name(name, KERNELS, "kernels")
    return name
