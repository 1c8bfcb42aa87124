"""End-to-end tuning: a whole student follows the original's predictions.

Sources: KL to the original as in PV-Tuning (arXiv 2405.14852) and QTIP (arXiv 2406.11235); scales
alone as in EfficientQAT's second phase (arXiv 2407.11062); codes straight through.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qtool.base import CausalModel
from qtool.training.descent import Learning, Point, Schedule, descend
from qtool.training.divergence import divergence
from qtool.training.student import learned_layers


def tune_end_to_end(
    student: CausalModel,
    original: CausalModel,
    vectors: Sequence[nn.Parameter],
    batches: Sequence[Tensor],
    held_out: Sequence[Tensor],
    schedule: Schedule,
    report: Callable[[Point], None],
    *,
    autocast: torch.dtype | None = None,
    captured: bool = False,
) -> list[Point]:
    """Let a student follow the original; it ends where it was best on the held-out samples.

    Args:
        student: See `make_student`.
        original: Dense, on the same device.
        vectors: Norms and biases of the student that learn as well.
        batches: Tokens, each (samples, length) int64, all of one shape; one a step, again from the
            start when they are through.
        held_out: Likewise, of any shapes.
        schedule: How long and how fast.
        report: Is told of each point; losses are KL in nats per token.
        autocast: In which the student runs; None: as it is.
        captured: On a card a step is one CUDA graph: faster for small models, which takes the
            memory of a step once more.
    """
    device = next(original.parameters()).device

    def logits(model: CausalModel, tokens: Tensor) -> Tensor:
        with torch.autocast(
            device.type, autocast, enabled=autocast is not None, cache_enabled=False
        ):
            found: Tensor = model(tokens, use_cache=False).logits
        return found.flatten(0, -2)

    def loss(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = original(tokens, use_cache=False).logits.flatten(0, -2)
        return divergence(logits(student, tokens), wanted)

    @torch.no_grad()
    def on_held_out() -> float:
        counts = [tokens.numel() for tokens in held_out]
        losses = [loss(tokens.to(device)) * tokens.numel() for tokens in held_out]
        return float(sum(losses)) / sum(counts)

    now = batches[0].to(device).clone()

    what = Learning(
        layers=[layer for _, layer in learned_layers(student)],
        vectors=vectors,
        feed=lambda step: now.copy_(batches[step % len(batches)]),
        loss=lambda: loss(now),
        held_out=on_held_out,
        captured=captured,
    )
    return descend(what, schedule, report)
