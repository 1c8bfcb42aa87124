"""What the experts of a block see: all of its tokens once, and of each expert those routed to it.

The block runs once per batch up to its experts, in the original and in the quantized model. What
each expert's layers see follows from that: the first sees the tokens themselves, the last what the
expert's own first layer makes of them. Tokens are those that the quantized model routes to an
expert; what they are in the original is taken whether the original routes them so or not.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from qtool.core import hessian
from qtool.core.activations import fake_quantize
from qtool.core.experts import ExpertName, SeparateExperts
from qtool.core.moments import Moments, no_moments
from qtool.scheme import ActivationScheme
from qtool.walk.filled_block import Block
from qtool.walk.statistics import InputStatistics
from qtool.walk.streams import Visit

TokensFrom = Literal["routed", "pooled", "all"]
"""Tokens that an expert's layer is solved for: those routed to it; what the layers of all experts
see of those routed to each; all tokens of the block, as if all were routed to it."""
STARVED = 1.0
"""Below this many tokens per input the Hessian of an expert's own tokens has no full rank."""
FEW_HELD_OUT = 32
"""With fewer held-out tokens routed to an expert, all held-out tokens judge its layers."""


@dataclass(frozen=True, slots=True)
class ExpertStatistics:
    """What a layer of one expert can be solved for."""

    tokens: int
    """Training tokens routed to it."""
    held_out: int
    """Held-out ones."""
    activation: ActivationScheme | None
    """How the inputs were quantized before they were measured; None: they weren't."""
    is_finite: bool
    """Whether no input left the range of its dtype."""
    candidates: Mapping[TokensFrom, Callable[[], InputStatistics]]
    """Each makes its own when it is called, once, for they are large. All are judged by the same
    held-out tokens; there is one but for starved experts."""


@dataclass(slots=True)
class RoutedTokens:
    """What goes into the experts of a block, batch by batch, off the card."""

    module: str
    """Dotted name of the experts, in the block."""
    reference: tuple[Tensor, ...]  # each (tokens, hidden), of the original model
    inputs: tuple[Tensor, ...]  # the same in the quantized model
    index: tuple[Tensor, ...]  # each (tokens, k), experts of each token in the quantized model
    num_train: int
    """Batches from this one on are held out."""
    _pooled: tuple[ActivationScheme | None, Moments] | None = field(default=None)

    def inputs_of(self, expert: ExpertName, visit: Visit) -> Iterator[Tensor]:
        """Yield what a layer sees of the training tokens routed to it, not yet quantized."""
        for batch in range(self.num_train):
            _, x = self._seen(expert, visit, batch, everyone=False)
            yield x

    def measure(
        self,
        expert: ExpertName,
        visit: Visit,
        *,
        token_cap: float | None,
        activation: ActivationScheme | None,
    ) -> ExpertStatistics:
        """Return what a layer of one expert can be solved for.

        Args:
            expert: Name of the layer, in the block.
            visit: The block where the walk stands.
            token_cap: Tokens above this multiple of the median norm are shrunk to it.
            activation: How the inputs are quantized; what that costs is a part of the drift.
        """

        def moments(*, held_out: bool, everyone: bool, one: ExpertName = expert) -> Moments:
            batches = range(self.num_train, len(self.inputs)) if held_out else range(self.num_train)
            seen = (self._seen(one, visit, batch, everyone=everyone) for batch in batches)
            return _summed(seen, token_cap, activation, for_errors=held_out)

        own = moments(held_out=False, everyone=False)
        judge = moments(held_out=True, everyone=False)
        held_out = judge.num_tokens
        if held_out < FEW_HELD_OUT:
            judge = moments(held_out=True, everyone=True)
        made: dict[TokensFrom, Callable[[], Moments]] = {}
        if own.num_tokens:
            made["routed"] = [own].pop  # nobody else has it then
        if own.num_tokens < STARVED * len(own.sums["xx"]):
            made["all"] = lambda: moments(held_out=False, everyone=True)
            if expert.weight == _experts(visit.quantized, self.module).last:
                of_one = partial(moments, held_out=False, everyone=False)
                made["pooled"] = lambda: self._pool(visit, expert, activation, of_one)

        def statistics(train: Callable[[], Moments]) -> InputStatistics:
            found = train()
            count = found.num_tokens
            return InputStatistics(slice(None), found, judge, count, activation, is_for_one=True)

        candidates = {name: partial(statistics, train) for name, train in made.items()}
        sums = (*own.sums.values(), *judge.sums.values())
        is_finite = all(bool(torch.isfinite(total).all()) for total in sums)
        return ExpertStatistics(own.num_tokens, held_out, activation, is_finite, candidates)

    def _pool(
        self,
        visit: Visit,
        expert: ExpertName,
        activation: ActivationScheme | None,
        moments: Callable[..., Moments],
    ) -> Moments:
        """Return the sums over all experts; made once, and kept off the card."""
        if self._pooled is None or self._pooled[0] != activation:
            count = _experts(visit.quantized, self.module).num_experts
            total = moments(one=expert._replace(number=0))
            for number in range(1, count):
                total = total.merged(moments(one=expert._replace(number=number)))
            self._pooled = activation, total.on("cpu")
        return self._pooled[1].on(_device_of(visit))

    def _seen(
        self, expert: ExpertName, visit: Visit, batch: int, *, everyone: bool
    ) -> tuple[Tensor, Tensor]:
        """Return what a layer sees of a batch in the original and in the quantized model."""
        original = _experts(visit.original, self.module)
        quantized = _experts(visit.quantized, self.module)
        device = _device_of(visit)
        parts = self.reference[batch], self.inputs[batch]
        if not everyone:  # most tokens needn't go to the card
            rows = (self.index[batch] == expert.number).any(-1).nonzero().squeeze(-1)
            parts = parts[0][rows], parts[1][rows]
        reference, x = (part.to(device, non_blocking=True) for part in parts)
        if expert.weight == quantized.last:
            reference = original.inner(expert.number, reference)
            x = quantized.inner(expert.number, x)
        return reference, x


def _summed(
    seen: Iterator[tuple[Tensor, Tensor]],
    token_cap: float | None,
    activation: ActivationScheme | None,
    *,
    for_errors: bool,
) -> Moments:
    total: Moments | None = None
    for reference, inputs in seen:
        x = inputs if activation is None else fake_quantize(inputs, activation)
        total = total or no_moments(x.shape[-1], None, device=x.device, for_errors=for_errors)
        if not len(x):
            continue
        drift = reference - x
        if token_cap is not None:
            cap = hessian.token_weights(x, token_cap)
            x, drift = (cap * x).to(x.dtype), (cap * drift).to(x.dtype)
        total.add(x, drift, None)
    assert total is not None
    return total


@torch.no_grad()
def route(visit: Visit, module: str) -> RoutedTokens:
    """Run the block, as it was and as it is, up to its experts on every batch.

    Args:
        visit: The block where the walk stands.
        module: Dotted name of the experts, in the block.
    """
    reference, inputs, indices = [], [], []
    streams = visit.streams
    for batch, (first, second) in enumerate(zip(streams.original, streams.quantized, strict=True)):
        other, others = visit.original.tokens_of(module, first, batch)
        x, index = visit.quantized.tokens_of(module, second, batch)
        paired = _experts(visit.quantized, module).paired(x, index, other, others)
        reference.append(paired.cpu())
        inputs.append(x.cpu())
        indices.append(index.cpu())
    return RoutedTokens(module, tuple(reference), tuple(inputs), tuple(indices), streams.num_train)


def _experts(block: Block, module: str) -> SeparateExperts:
    found = block.module.get_submodule(module)
    assert isinstance(found, SeparateExperts)
    return found


def _device_of(visit: Visit) -> torch.device:
    return next(visit.quantized.module.parameters()).device
