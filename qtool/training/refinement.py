"""Code refinement: of each layer the few codes that promise most move, if that helps.

Source: PV-Tuning (arXiv 2405.14852): of a step over codes only a small share, the largest changes,
is taken. Ours: the gradient is that of many batches, how large the share is, is searched, and a
move is kept only if the held-out loss falls.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from qtool.core.learned import gaps_of, moved_codes, values_of
from qtool.training.student import LearnedLinear

PARTS = (1.0, 0.25, 0.0625)
"""Of the share that is allowed, tried in turn."""


def refine_codes(
    layers: Sequence[LearnedLinear],
    losses: Callable[[], Iterable[Tensor]],
    held_out: Callable[[], float],
    *,
    share: float,
    before: float,
) -> float:
    """Move codes by a step each, those whose slopes promise most; all or none, by what is held out.

    Args:
        layers: Their codes move.
        losses: Differentiable losses of several batches, one after the other.
        held_out: Loss on what isn't learned from.
        share: Of a layer's codes, may move.
        before: What `held_out` gives now.

    Returns:
        What `held_out` gives afterwards: no more than before.
    """
    slopes = _slopes(layers, losses)
    moves = [_moves(*pair, share) for pair in zip(layers, slopes, strict=True)]
    del slopes
    for part in PARTS:
        kept = [_move(layer, *move, part) for layer, move in zip(layers, moves, strict=True)]
        after = held_out()
        if after < before:
            return after
        for layer, (places, _), codes in zip(layers, moves, kept, strict=True):
            layer.codes.view(-1)[places[: len(codes)]] = codes
    return before


def _slopes(
    layers: Sequence[LearnedLinear], losses: Callable[[], Iterable[Tensor]]
) -> list[Tensor]:
    """Return what a step of codes up adds to the losses, to first order: in the shape of codes."""
    for layer in layers:
        layer.watched = torch.zeros(layer.codes.shape, device=layer.codes.device)
        layer.watched.requires_grad_()
    watched = [layer.watched for layer in layers if layer.watched is not None]
    sums = [torch.zeros_like(each, requires_grad=False) for each in watched]
    try:
        for loss in losses():
            for total, grad in zip(sums, torch.autograd.grad(loss, watched), strict=True):
                total += grad
    finally:
        for layer in layers:
            layer.watched = None
    return sums


@torch.no_grad()
def _moves(layer: LearnedLinear, slopes: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return the places of the codes that promise most, best first, and what they would become."""
    scales, offsets = layer.start.planes(layer.parameters_now())
    wanted = moved_codes(scales, offsets, layer.codes, -slopes.sign())
    change = values_of(scales, offsets, wanted) - values_of(scales, offsets, layer.codes)
    steps = change / gaps_of(scales).unsqueeze(-1)  # no number where a group has but one level
    gains = -(slopes * steps).nan_to_num(0.0, 0.0, 0.0).flatten()
    found = gains.topk(max(1, int(share * gains.numel())))
    places = found.indices[found.values > 0]
    return places, wanted.view(-1)[places]


def _move(layer: LearnedLinear, places: Tensor, wanted: Tensor, part: float) -> Tensor:
    """Move the first codes of a list; return what they were."""
    some = places[: max(1, int(part * len(places)))]
    flat = layer.codes.view(-1)
    before = flat[some]
    flat[some] = wanted[: len(some)]
    return before
