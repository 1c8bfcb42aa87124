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
from qtool.core.parts import Parts, slices, within_memory
from qtool.training.descent import Learning, Memory, descend, unchanged
from qtool.training.divergence import divergence
from qtool.training.refinement import refine_codes
from qtool.training.schedule import Point, Schedule
from qtool.training.student import learned_layers

LOOKS = "looks at held-out samples are taken"
"""Where memory is full in parts: a sentence begins so."""
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
        return divergence(self._predicted(tokens), self._wanted(tokens))

    def share(self, tokens: Tensor, samples: slice) -> Tensor:
        """Return what some samples make of that; those of all add up to it."""
        some = tokens[samples]
        return self.divergence(some) * (len(some) / len(tokens))

    def losses(self, tokens: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return the divergence, and the student's surprise at words drawn from what it predicts.

        Nats per token. The second's gradient has the Fisher information as its variance (Martens
        2014, arXiv 1412.1193).
        """
        found = self._predicted(tokens)
        generator = torch.Generator(tokens.device).manual_seed(seed)
        chances = found.detach().float().softmax(-1)
        drawn = torch.multinomial(chances, 1, generator=generator).squeeze(-1)
        surprise = nn.functional.cross_entropy(found.float(), drawn)
        return divergence(found, self._wanted(tokens)), surprise

    @torch.no_grad()
    def _wanted(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.original(tokens, use_cache=False).logits
        return logits.flatten(0, -2)

    def _predicted(self, tokens: Tensor) -> Tensor:
        on, kind = self.autocast is not None, tokens.device.type
        with torch.autocast(kind, self.autocast, enabled=on, cache_enabled=False):
            logits: Tensor = self.student(tokens, use_cache=False).logits
        return logits.flatten(0, -2)


@dataclass(frozen=True, slots=True)
class Course:
    """What a student learns from, and what it is judged by."""

    batches: Sequence[Tensor]
    """Tokens, each (samples, length) int64, all of one shape; one a step, again from the start when
    they are through."""
    held_out: Sequence[Tensor]
    """Likewise, of any shapes."""

    def learning(self, pair: Pair, code_share: float, parts: Parts | None = None) -> Learning:
        """Return what is learned, and by what loss: KL in nats per token."""
        device = next(pair.original.parameters()).device
        now = self.batches[0].to(device).clone()
        layers = [layer for _, layer in learned_layers(pair.student)]

        def feed(step: int) -> None:
            now.copy_(self.batches[step % len(self.batches)])

        @torch.no_grad()
        def on_held_out() -> float:
            total = sum(tokens.numel() for tokens in self.held_out)
            losses = [
                _looked(pair, each.to(device), parts) * each.numel() for each in self.held_out
            ]
            return float(torch.stack(losses).sum()) / total

        def refine(step: int, before: float) -> float:
            count = len(self.batches)
            some = [(i, self.batches[i % count]) for i in range(step, step + REFINED_BY)]
            return refine_codes(
                layers,
                lambda: (pair.losses(tokens.to(device), i) for i, tokens in some),
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
            share=lambda samples: pair.share(now, samples),
            samples=lambda: len(now),
            parts=parts,
        )


def _looked(pair: Pair, tokens: Tensor, parts: Parts | None) -> Tensor:
    """Return the divergence of one batch that isn't learned from."""

    def work(count: int) -> Tensor:
        if count == 1:
            return pair.divergence(tokens)
        some = slices(len(tokens), count)
        return torch.stack([pair.share(tokens, samples) for samples in some]).sum()

    return within_memory(parts, LOOKS, work, most=len(tokens))


def tune_end_to_end(
    pair: Pair,
    course: Course,
    schedule: Schedule,
    report: Callable[[Point], None],
    memory: Memory | None = None,
    parts: Parts | None = None,
) -> list[Point]:
    """Let a student follow the original; it ends where it was best on the held-out samples.

    Args:
        pair: Both models.
        course: What it learns from.
        schedule: How long and how fast.
        report: Is told of each point; losses are KL in nats per token.
        memory: Lets it go on where it was stopped.
        parts: That batches are learned from in where memory is full; None: they are whole.
    """
    return descend(course.learning(pair, schedule.code_share, parts), schedule, report, memory)


def best_rate(
    pair: Pair,
    course: Course,
    schedule: Schedule,
    rates: Sequence[float],
    parts: Parts | None = None,
) -> dict[float, float]:
    """Try learning rates for a few steps each, from where the student is; it stays there.

    Returns:
        Loss on the held-out samples at the end of each, by rate, the best one first; a rate at
        which it diverges is last.
    """
    what = course.learning(pair, 0.0, parts)
    found = {}
    for rate in rates:
        with unchanged(what):
            points = descend(what, replace(schedule, learning_rate=rate), lambda _point: None)
        found[rate] = points[-1].held_out
    return dict(sorted(found.items(), key=lambda item: (math.isnan(item[1]), item[1])))
