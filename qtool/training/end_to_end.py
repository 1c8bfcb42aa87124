"""End-to-end tuning: a whole student follows the original's predictions.

Sources: KL to the original as in PV-Tuning (arXiv 2405.14852) and QTIP (arXiv 2406.11235), only
scales as in EfficientQAT's second phase (arXiv 2407.11062); codes straight through.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtool.base import CausalModel
from qtool.training.divergence import divergence
from qtool.training.student import learned_layers

Report = Callable[["Point"], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long and how fast."""

    steps: int = 500
    batch_size: int = 8
    learning_rate: float = 2e-3
    """Of parameters, in their units."""
    code_rate: float = 3e-3
    """Of the latent values, in steps of codes."""
    warmup: int = 20
    floor: float = 0.05
    """The rate falls along a cosine to this share."""
    max_norm: float = 1.0
    """The gradient is shortened to it."""
    check_every: int = 50
    """Steps between two looks at the held-out samples."""
    autocast: torch.dtype | None = torch.bfloat16

    def factor(self, step: int) -> float:
        """Return what the rates are multiplied by in a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True, slots=True)
class Point:
    """One line of the curve."""

    step: int
    trained: float
    """KL on the samples since the last point, nats per token."""
    held_out: float
    factor: float


def tune_end_to_end(
    student: CausalModel,
    original: CausalModel,
    vectors: Sequence[nn.Parameter],
    samples: Tensor,
    held_out: Tensor,
    schedule: Schedule,
    report: Report,
) -> list[Point]:
    """Let a student follow the original; it ends where it was best on the held-out samples.

    Args:
        student: See `make_student`.
        original: Dense, on the same device.
        vectors: Norms and biases of the student that learn as well.
        samples: (count, length) int64, repeated as often as the steps need.
        held_out: Likewise.
        schedule: How long and how fast.
        report: Is told of each point.
    """
    optimizer = _optimizer(student, vectors, schedule)
    device = next(original.parameters()).device
    rates = [group["lr"] for group in optimizer.param_groups]
    learning = [value for group in optimizer.param_groups for value in group["params"]]
    best, points, total, count = _copied(learning), [], 0.0, 0

    def loss_of(tokens: Tensor) -> Tensor:
        tokens = tokens.to(device)
        with torch.no_grad():
            wanted = _logits(original, tokens, schedule)
        return divergence(_logits(student, tokens, schedule), wanted)

    def look(step: int) -> float:
        with torch.no_grad():
            losses = [float(loss_of(batch)) for batch in held_out.split(schedule.batch_size)]
        trained = total / count if count else math.nan
        points.append(Point(step, trained, sum(losses) / len(losses), schedule.factor(step)))
        report(points[-1])
        return points[-1].held_out

    least = look(0)
    for step in range(schedule.steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule.factor(step)
        begin = step * schedule.batch_size % (len(samples) - schedule.batch_size + 1)
        loss = loss_of(samples[begin : begin + schedule.batch_size])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learning, schedule.max_norm)
        optimizer.step()
        total, count = total + loss.detach(), count + 1
        if (step + 1) % schedule.check_every == 0 or step + 1 == schedule.steps:
            found = look(step + 1)
            total, count = 0.0, 0
            if found < least:
                least, best = found, _copied(learning)
    with torch.no_grad():
        for value, kept in zip(learning, best, strict=True):
            value.copy_(kept)
    return points


def _logits(model: CausalModel, tokens: Tensor, schedule: Schedule) -> Tensor:
    with torch.autocast(tokens.device.type, schedule.autocast, enabled=schedule.autocast is not None):
        return model(tokens, use_cache=False).logits.flatten(0, -2)


def _optimizer(
    student: CausalModel, vectors: Sequence[nn.Parameter], schedule: Schedule
) -> torch.optim.Optimizer:
    layers = [layer for _, layer in learned_layers(student)]
    moves = [move for layer in layers for move in layer.moves.values()]
    shifts = [layer.shifts for layer in layers if layer.shifts is not None]
    groups = [{"params": moves, "lr": schedule.learning_rate}]
    for vector in vectors:  # in units of its own size, as the scales are
        size = float(vector.detach().square().mean().sqrt()) or 1.0
        groups.append({"params": [vector], "lr": schedule.learning_rate * size})
    if shifts:
        groups.append({"params": shifts, "lr": schedule.code_rate})
    fused = moves[0].is_cuda
    return torch.optim.Adam(groups, betas=(0.9, 0.95), fused=fused)


def _copied(values: Sequence[Tensor]) -> list[Tensor]:
    return [value.detach().clone() for value in values]
