"""End-to-end tuning: a whole student follows the original's predictions.

Sources: KL to the original as in PV-Tuning (arXiv 2405.14852) and QTIP (arXiv 2406.11235); scales
alone as in EfficientQAT's second phase (arXiv 2407.11062); codes straight through.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qtool.base import CausalModel
from qtool.training.descent import Learning, Memory, Point, Schedule, descend, unchanged
from qtool.training.divergence import divergence
from qtool.training.refinement import refine_codes
from qtool.training.student import learned_layers

REFINED_BY = 16
"""Batches whose gradients decide together which codes move."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A student, whom it follows, and how both run."""

    student: CausalModel
    """See `make_student`."""
    original: CausalModel
    """Dense, on the same device."""
    vectors: Sequence[nn.Parameter] = ()
    """Norms and biases of the student that learn as well."""
    autocast: torch.dtype | None = None
    """In which the student runs; None: as it is."""
    captured: bool = False
    """On a card a step is one CUDA graph: several times faster for small models, and takes the
    memory of a step once more."""

    def divergence(self, tokens: Tensor) -> Tensor:
        """Return KL(original || student), nats per token, of tokens (samples, length) int64."""
        with torch.no_grad():
            wanted = self.original(tokens, use_cache=False).logits.flatten(0, -2)
        on = self.autocast is not None
        kind = tokens.device.type
        with torch.autocast(kind, self.autocast, enabled=on, cache_enabled=False):
            found = self.student(tokens, use_cache=False).logits.flatten(0, -2)
        return divergence(found, wanted)


@dataclass(frozen=True, slots=True)
class Course:
    """What a student learns from, and what it is judged by."""

    batches: Sequence[Tensor]
    """Tokens, each (samples, length) int64, all of one shape; one a step, again from the start when
    they are through."""
    held_out: Sequence[Tensor]
    """Likewise, of any shapes."""

    def learning(self, pair: Pair, code_share: float) -> Learning:
        """Return what is learned, and by what loss: KL in nats per token."""
        device = next(pair.original.parameters()).device
        now = self.batches[0].to(device).clone()
        layers = [layer for _, layer in learned_layers(pair.student)]

        def feed(step: int) -> None:
            now.copy_(self.batches[step % len(self.batches)])

        @torch.no_grad()
        def on_held_out() -> float:
            total = sum(tokens.numel() for tokens in self.held_out)
            losses = [pair.divergence(each.to(device)) * each.numel() for each in self.held_out]
            return float(torch.stack(losses).sum()) / total

        def refine(step: int, before: float) -> float:
            count = len(self.batches)
            some = [self.batches[i % count] for i in range(step, step + REFINED_BY)]
            return refine_codes(
                layers,
                lambda: (pair.divergence(tokens.to(device)) for tokens in some),
                on_held_out,
                share=code_share,
                num_tokens=now.numel(),
                before=before,
            )

        return Learning(
            layers,
            pair.vectors,
            feed,
            lambda: pair.divergence(now),
            on_held_out,
            pair.captured,
            refine if code_share > 0 else None,
        )


def tune_end_to_end(
    pair: Pair,
    course: Course,
    schedule: Schedule,
    report: Callable[[Point], None],
    memory: Memory | None = None,
) -> list[Point]:
    """Let a student follow the original; it ends where it was best on the held-out samples.

    Args:
        pair: Both models.
        course: What it learns from.
        schedule: How long and how fast.
        report: Is told of each point; losses are KL in nats per token.
        memory: Lets it go on where it was stopped.
    """
    return descend(course.learning(pair, schedule.code_share), schedule, report, memory)


def best_rate(
    pair: Pair, course: Course, schedule: Schedule, rates: Sequence[float]
) -> dict[float, float]:
    """Try learning rates for a few steps each, from where the student is; it stays there.

    Returns:
        Loss on the held-out samples at the end of each, by rate, the best one first; a rate at
        which it diverges is last.
    """
    what = course.learning(pair, 0.0)
    found = {}
    for rate in rates:
        with unchanged(what):
            points = descend(what, replace(schedule, learning_rate=rate), lambda _point: None)
        found[rate] = points[-1].held_out
    return dict(sorted(found.items(), key=lambda item: (math.isnan(item[1]), item[1])))
