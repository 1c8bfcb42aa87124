"""`qtool bench --tune`: what is fastest on the card that is there, as a table for `selection`.

What is measured is a few sizes at one token, and some batches. Tokens from which on
bit_plane_wgmma.cu is faster aren't: cards that run it were measured.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch

from qtool.base import Emit, Progress
from qtool.runtime.backends.cuda import linear_kernels
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.selection import BLOCK, Selection, Tuning, card_to_try
from qtool.scheme import Shape2D, WeightScheme
from qtool.timing.kernels import Rig, inputs, stored_bytes
from qtool.timing.synthetic import generator_on, random_weight
from qtool.timing.timing import clones, rotation, time_calls

TUNED_GROUP = 128
MANY_WEIGHTS, MANY_INPUTS = Shape2D(28672, 4096), Shape2D(4096, 14336)
"""What `Selection.pairs` and `alone` are for."""
FEW_WEIGHTS = Shape2D(4096, 4096)
TABLE_SHAPES = (Shape2D(2048, 2048), FEW_WEIGHTS, Shape2D(6144, 4096), Shape2D(8192, 4096))
TUNINGS = tuple(
    Tuning(warps, stages, per)
    for warps, stages, per in (
        *((16, 3, 1), (16, 2, 1), (12, 3, 1), (8, 4, 1)),
        *((8, 4, 2), (8, 3, 2), (8, 2, 2), (6, 3, 2)),
    )
)
BITS = (2, 4)
TABLE_BITS = (2, 3, 4)
BLOCKS = (2, 3, 4, 5, 6)
"""Of 16 tokens, that planes may still multiply sooner than a dequantized weight."""


class KernelTrial(NamedTuple):
    """One thing that is timed."""

    shape: Shape2D
    num_bits: int
    tokens: int
    kernel: str
    tuning: Tuning | None = None
    """Of the kernel `planes`; None: as the card's table says until now."""


Seconds = Callable[[KernelTrial], float]
"""Times a trial; infinity: it can't run."""


@dataclass(frozen=True, slots=True)
class TuneResult:
    """What was found, and all that was measured for it."""

    selection: Selection
    trials: tuple[tuple[KernelTrial, float], ...]
    """With microseconds; infinity: it can't run."""


def tuned_selection(card_name: str, base: Selection, seconds: Seconds) -> Selection:
    """Return what is fastest; what isn't measured is taken from `base`."""
    pairs, alone = (_fastest(shape, seconds) for shape in (MANY_WEIGHTS, MANY_INPUTS))
    found = replace(base, measured_on=card_name, pairs=pairs, alone=alone)
    tables = _tables(seconds, {FEW_WEIGHTS: alone})
    products = min(_most_blocks(bits, MANY_WEIGHTS, seconds) * BLOCK * bits for bits in BITS)
    few = all(_most_blocks(bits, FEW_WEIGHTS, seconds) > 1 for bits in BITS)
    least = math.prod(FEW_WEIGHTS) if few else base.least_weights
    return replace(found, tables=tables, most_products=products, least_weights=least)


def _fastest(shape: Shape2D, seconds: Seconds) -> Tuning:
    """Return the tuning with the least product of times."""

    def time(tuning: Tuning) -> float:
        return math.prod(seconds(KernelTrial(shape, bits, 1, "planes", tuning)) for bits in BITS)

    return min(TUNINGS, key=time)


def _tables(seconds: Seconds, tunings: dict[Shape2D, Tuning]) -> range:
    """Return from how many weights on, and up to how many bits, tables are faster than planes."""
    tuning = tunings[FEW_WEIGHTS]
    faster = [
        (math.prod(shape), bits)
        for shape in TABLE_SHAPES
        for bits in TABLE_BITS
        if seconds(KernelTrial(shape, bits, 1, "lut"))
        < seconds(KernelTrial(shape, bits, 1, "planes", tuning))
    ]
    if not faster:
        return range(1, 1)
    return range(min(weights for weights, _ in faster), max(math.prod(one) for one in faster))


def _most_blocks(bits: int, shape: Shape2D, seconds: Seconds) -> int:
    """Return how many blocks of tokens planes multiply sooner than a dequantized weight."""
    most = 1
    for blocks in BLOCKS:
        both = (seconds(KernelTrial(shape, bits, blocks * BLOCK, name)) for name in PLANES_OR_DENSE)
        if next(both) > next(both):
            break
        most = blocks
    return most


PLANES_OR_DENSE = ("planes", "dequantize")


@dataclass(slots=True)
class CardSeconds:
    """Times trials on a card, each once."""

    rig: Rig
    base: Selection
    emit: Emit
    trials: dict[KernelTrial, float] = field(default_factory=dict)
    _kept: dict[tuple[Shape2D, int], Sequence[KernelWeight]] = field(default_factory=dict)

    def __call__(self, trial: KernelTrial) -> float:
        """Return the seconds of a trial; infinity: it can't run."""
        if trial not in self.trials:
            shape, bits, tokens, kernel, _ = trial
            self.emit(Progress(f"time {kernel}: {bits} bits, {tokens} tokens, {shape}"))
            self.trials[trial] = self._measured(trial)
        return self.trials[trial]

    def _measured(self, trial: KernelTrial) -> float:
        card = self.rig.card
        if trial.tuning is not None:
            tried = replace(self.base, alone=trial.tuning, pairs=trial.tuning)
            card = card._replace(name=card_to_try(card.name, tried))
        weights = self._weights(trial.shape, trial.num_bits)
        x = inputs(trial.tokens, trial.shape.in_features, weights[0].dtype, self.rig.device)
        run = partial(linear_kernels.matmul, x, launch=self.rig.launch, card=card)
        calls = [partial(run, weight=weight, kernel=trial.kernel) for weight in weights]
        try:
            return time_calls(calls, self.rig.timer)
        except Exception:  # noqa: BLE001 - whatever the card refuses isn't the fastest
            return math.inf

    def _weights(self, shape: Shape2D, bits: int) -> Sequence[KernelWeight]:
        """Return copies of a random weight that leave the L2 cache cold, those of one size."""
        if (shape, bits) not in self._kept:
            self._kept.clear()
            scheme = WeightScheme(num_bits=bits, group_size=TUNED_GROUP)
            drawn = generator_on(self.rig.device)
            weight = random_weight(shape, scheme, drawn, keep_stored=True)
            assert isinstance(weight, KernelWeight)
            copies = clones(weight, stored_bytes(weight), self.rig.l2_bytes)
            self._kept[shape, bits] = rotation(copies)
        return self._kept[shape, bits]


@torch.no_grad()
def tune(rig: Rig, base: Selection, emit: Emit) -> TuneResult:
    """Measure what is fastest on a card; where something is as good, `base` stays."""
    seconds = CardSeconds(rig, base, emit)
    selection = tuned_selection(rig.card.name, base, seconds)
    measured = ((trial, time * 1e6) for trial, time in seconds.trials.items())
    return TuneResult(selection, tuple(measured))
