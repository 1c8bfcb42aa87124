"""How long and how fast something learns, and the points of its curve."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long and how fast."""

    steps: int
    learning_rate: float
    """Of parameters, in their units: what a first step moves them by. Norms and biases have the
    same part of their size as a code has of a layer's range."""
    code_rate: float = 0.0
    """Of latent values, in steps of codes; 0: codes stay."""
    code_share: float = 0.0
    """Of a layer's codes, may move at each look, whatever their latent values; 0: none."""
    warmup: int = 20
    floor: float = 0.05
    """The rates fall to this share."""
    falls: Literal["cosine", "line"] = "cosine"
    """Along what."""
    weight_decay: float = 0.0
    """What the rate takes of a parameter in each step (Loshchilov and Hutter, arXiv 1711.05101)."""
    patience: int | None = None
    """It ends after so many looks at the held-out samples that found nothing better; None: not."""
    max_norm: float = 1.0
    """The gradient is shortened to it."""
    check_every: int = 50
    """Steps between two looks at the held-out samples."""
    keeps: Literal["best", "last"] = "best"
    """Where it ends: at the least loss on the held-out samples, or at the last that was finite."""

    def factor(self, step: int) -> float:
        """Return what the rates are multiplied by in a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        left = 1 - done if self.falls == "line" else (1 + math.cos(math.pi * done)) / 2
        return self.floor + (1 - self.floor) * left


@dataclass(frozen=True, slots=True)
class Point:
    """One line of a curve."""

    step: int
    trained: float | None
    """Mean loss since the last point; None at the first."""
    held_out: float
    rate: float
    """Of the parameters."""


def is_over(points: Sequence[Point], schedule: Schedule) -> bool:
    """Return whether there is no more to hope for, by the patience of a schedule."""
    if schedule.patience is None:
        return False
    held_out = [point.held_out for point in points]
    return len(points) - 1 - held_out.index(min(held_out)) >= schedule.patience
