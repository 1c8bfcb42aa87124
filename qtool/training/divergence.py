"""How far a student's predictions are from the original's, and its gradient, in little memory."""

import torch
from torch import Tensor

from qtool.core.autograd import AutogradContext

CHUNK = 1024
"""Tokens whose logits are in float32 at a time."""


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, logits: Tensor, wanted: Tensor, shares: Tensor) -> Tensor:
        grad = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=logits.device)
        for start in range(0, len(logits), CHUNK):
            piece = slice(start, start + CHUNK)
            target = wanted[piece].float().log_softmax(-1)
            found = logits[piece].float().log_softmax(-1)
            chances = target.exp()
            share = shares[piece].unsqueeze(-1)
            total += (share * chances * (target - found)).sum()
            if grad is not None:
                grad[piece] = (found.exp_() - chances) * share
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None, None


def divergence(logits: Tensor, wanted: Tensor, shares: Tensor | None = None) -> Tensor:
    """Return the mean of KL(original || student) over tokens, in nats; over the whole vocabulary.

    Args:
        logits: Of the student, (tokens, vocabulary).
        wanted: Of the original, likewise.
        shares: (tokens,) float32: what each counts, in place of a mean; their sum is 1 for one.
    """
    if shares is None:
        shares = torch.full(logits.shape[:1], 1 / max(1, len(logits)), device=logits.device)
    value: Tensor = _Divergence.apply(logits, wanted, shares)  # type: ignore[no-untyped-call]
    return value
