"""End-to-end tuning: a whole student follows the original's predictions.

Sources: KL to the original as in PV-Tuning (arXiv 2405.14852) and QTIP (arXiv 2406.11235); scales
alone as in EfficientQAT's second phase (arXiv 2407.11062); codes straight through.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtool.base import CausalModel
from qtool.training.descent import Learning, Memory, Point, Schedule, descend
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


def tune_end_to_end(
    pair: Pair,
    batches: Sequence[Tensor],
    held_out: Sequence[Tensor],
    schedule: Schedule,
    report: Callable[[Point], None],
    memory: Memory | None = None,
) -> list[Point]:
    """Let a student follow the original; it ends where it was best on the held-out samples.

    Args:
        pair: Both models.
        batches: Tokens, each (samples, length) int64, all of one shape; one a step, again from the
            start when they are through.
        held_out: Likewise, of any shapes.
        schedule: How long and how fast.
        report: Is told of each point; losses are KL in nats per token.
        memory: Lets it go on where it was stopped.
    """
    device = next(pair.original.parameters()).device
    now = batches[0].to(device).clone()

    def feed(step: int) -> None:
        now.copy_(batches[step % len(batches)])

    @torch.no_grad()
    def on_held_out() -> float:
        total = sum(tokens.numel() for tokens in held_out)
        losses = [pair.divergence(tokens.to(device)) * tokens.numel() for tokens in held_out]
        return float(torch.stack(losses).sum()) / total

    layers = [layer for _, layer in learned_layers(pair.student)]

    def refine(step: int, before: float) -> float:
        some = [batches[i % len(batches)] for i in range(step, step + REFINED_BY)]
        return refine_codes(
            layers,
            lambda: (pair.divergence(tokens.to(device)) for tokens in some),
            on_held_out,
            share=schedule.code_share,
            before=before,
        )

    what = Learning(
        layers,
        pair.vectors,
        feed,
        lambda: pair.divergence(now),
        on_held_out,
        pair.captured,
        refine if schedule.code_share > 0 else None,
    )
    return descend(what, schedule, report, memory)
