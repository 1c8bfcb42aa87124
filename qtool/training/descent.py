"""The one loop that all tuning goes through: Adam along a cosine, and the best state is kept."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtool.training.student import LearnedLinear

BETAS = (0.9, 0.95)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long and how fast."""

    steps: int
    learning_rate: float
    """Of parameters, in their units: what a first step moves them by."""
    code_rate: float = 0.0
    """Of latent values, in steps of codes; 0: codes stay."""
    warmup: int = 20
    floor: float = 0.05
    """The rates fall along a cosine to this share."""
    max_norm: float = 1.0
    """The gradient is shortened to it."""
    check_every: int = 50
    """Steps between two looks at the held-out samples."""

    def factor(self, step: int) -> float:
        """Return what the rates are multiplied by in a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True, slots=True)
class Point:
    """One line of a curve."""

    step: int
    trained: float | None
    """Mean loss since the last point; None at the first."""
    held_out: float
    rate: float
    """Of the parameters."""


@dataclass(frozen=True, slots=True)
class Learning:
    """What is learned, and by what loss."""

    layers: Sequence[LearnedLinear]
    vectors: Sequence[nn.Parameter]
    """Norms and biases."""
    loss: Callable[[int], Tensor]
    """Of a step, differentiable."""
    held_out: Callable[[], float]
    """Loss on samples that aren't learned from."""


def descend(what: Learning, schedule: Schedule, report: Callable[[Point], None]) -> list[Point]:
    """Learn; what is learned ends where the held-out loss was least, which may be the start.

    A loss that isn't finite ends it early: what it did is taken back.
    """
    optimizer = _optimizer(what, schedule)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    values = [value for group in optimizer.param_groups for value in group["params"]]
    points = [Point(0, None, what.held_out(), schedule.learning_rate * schedule.factor(0))]
    report(points[0])
    best, losses = _copied(values), list[Tensor]()
    for step in range(schedule.steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule.factor(step)
        loss = what.loss(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(values, schedule.max_norm)
        optimizer.step()
        losses.append(loss.detach())
        if (step + 1) % schedule.check_every and step + 1 < schedule.steps:
            continue
        trained, found = float(torch.stack(losses).mean()), what.held_out()
        least = min(point.held_out for point in points)
        points.append(Point(step + 1, trained, found, rates[0] * schedule.factor(step)))
        report(points[-1])
        losses.clear()
        if found < least:
            best = _copied(values)
        if not math.isfinite(trained) or not math.isfinite(found):
            break
    with torch.no_grad():
        for value, kept in zip(values, best, strict=True):
            value.copy_(kept)
    return points


def _optimizer(what: Learning, schedule: Schedule) -> torch.optim.Optimizer:
    moves = [move for layer in what.layers for move in layer.moves.values()]
    groups = [{"params": moves, "lr": schedule.learning_rate}]
    for vector in what.vectors:  # in units of its own size, as the scales are
        size = float(vector.detach().square().mean().sqrt()) or 1.0
        groups.append({"params": [vector], "lr": schedule.learning_rate * size})
    shifts = [layer.shifts for layer in what.layers if layer.shifts is not None]
    if shifts:
        groups.append({"params": shifts, "lr": schedule.code_rate})
    return torch.optim.Adam(groups, betas=BETAS, fused=moves[0].is_cuda)


def _copied(values: Sequence[Tensor]) -> list[Tensor]:
    return [value.detach().clone() for value in values]
