"""Block tuning: the quantized weights of one block learn to give the original block's outputs.

Sources: AutoRound (arXiv 2309.05516) and SignRoundV2 (arXiv 2512.04746): learned rounding, inputs
of the quantized model, the best state kept; EfficientQAT's first phase (arXiv 2407.11062).
Tokens count by their relative error: the few with huge outputs (attention sinks) would be all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.core.parts import Parts, most_parts
from qtool.training.descent import Learning, descend
from qtool.training.schedule import Point, Schedule
from qtool.training.student import LearnedLinear

Weighed = tuple[Tensor, Tensor, Tensor]
"""Input, target, and what multiplies its squared error: (samples, length, width), and 1 for it."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a block learns from, batch by batch; each tensor is (samples, length, width)."""

    forward: Callable[[Tensor, int], Tensor]
    """From an input and the number of its batch to the output of the block that learns."""
    inputs: Sequence[Tensor]
    """What the quantized model gives it, on any device."""
    targets: Sequence[Tensor]
    """What the original block gives for the original's inputs."""
    num_train: int
    """Batches from this one on are held out."""
    alike: Sequence[int] = ()
    """Batches to learn from that are of one shape, and one to `forward`. On a card a step is one
    CUDA graph then, and others aren't learned from; empty: there is no such graph."""
    part: Callable[[Tensor, int, slice], Tensor] | None = None
    """As `forward`, of some samples of the batch; None: a batch is one."""
    parts: Parts | None = None
    """That batches are learned from in where memory is full; None: they are whole."""

    def loss(self, batch: int, given: Weighed) -> Tensor:
        """Return the mean error of a batch by its number."""
        hidden, target, weight = given
        return _mean_error(self.forward(hidden, batch), target, weight)

    def share(self, batch: int, given: Weighed, samples: slice) -> Tensor:
        """Return what some samples make of that; those of all add up to it."""
        assert self.part is not None
        hidden, target, weight = given
        found, some = self.part(hidden, batch, samples), weight[samples]
        return _mean_error(found, target[samples], some) * (len(some) / len(weight))


def tune_block(
    layers: Sequence[LearnedLinear],
    lesson: Lesson,
    schedule: Schedule,
    report: Callable[[Point], None],
) -> list[Point]:
    """Let the layers of one block learn; they end where the held-out loss was least.

    Args:
        layers: They stand in the block that the lesson runs.
        lesson: What they learn from.
        schedule: How long and how fast.
        report: Is told of each point; losses are squared errors relative to the outputs.
    """
    batches = _weighed(lesson)
    numbers = lesson.alike or range(lesson.num_train)
    batch, now = numbers[0], batches[numbers[0]]
    if lesson.alike:  # each batch is copied to where the graph reads
        hidden, target, weight = now
        now = hidden.to(target.device, copy=True), target.clone(), weight.clone()

    def feed(step: int) -> None:
        nonlocal batch, now
        following = numbers[step % len(numbers)]
        if not lesson.alike:
            batch, now = following, batches[following]
            return
        for place, part in zip(now, batches[following], strict=True):
            place.copy_(part, non_blocking=True)

    @torch.no_grad()
    def held_out() -> float:
        rest = list(enumerate(batches))[lesson.num_train :]
        return float(sum(lesson.loss(*each) for each in rest))

    what = Learning(
        layers,
        (),
        feed,
        lambda: lesson.loss(batch, now),
        held_out,
        captured=bool(lesson.alike),
        share=lambda samples: lesson.share(batch, now, samples),
        samples=lambda: 1 if lesson.part is None else most_parts(now[0]),
        parts=lesson.parts,
    )
    return descend(what, schedule, report)


def _weighed(lesson: Lesson) -> list[Weighed]:
    """Return all batches with what makes the squared errors of their tokens relative."""
    sizes = [target.float().square().sum(-1, keepdim=True) for target in lesson.targets]
    typical = torch.cat([size.flatten() for size in sizes]).median()
    weights = [1 / torch.maximum(size, typical) for size in sizes]
    return list(zip(lesson.inputs, lesson.targets, weights, strict=True))


def _mean_error(found: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    error = (found.float() - target.float()).square()
    return (error * weight).sum(-1).mean()
