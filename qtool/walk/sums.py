"""Sums over the tokens that a linear sees: chunk by chunk of the samples, added up in order."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.core import hessian
from qtool.core.activations import fake_quantize
from qtool.core.moments import Moments, OrderedTotal, no_moments
from qtool.scheme import ActivationScheme
from qtool.walk.filled_block import Block
from qtool.walk.statistics import InputStatistics, RowGroups
from qtool.walk.streams import Visit

ALL_ALIKE = ((slice(None), None),)
"""Rows, and weights of the tokens there, where there is one group of rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SumOptions:
    """What is summed of the tokens that linears with one input see, and with which weights."""

    residual: tuple[str, str] | None = None
    """Linears whose outputs go into the residual stream, of attention, then of the MLP; None: no
    residual stream is looked at."""
    token_cap: float | None = None
    """Tokens above this multiple of the median norm are shrunk to it; None: none are."""
    groups: RowGroups | None = None
    """Of output channels, each measured with its weights of the tokens, drifts too; None: all
    channels are one, and so are all weights."""
    activation: ActivationScheme | None = None
    """How the inputs are quantized; what that costs is a part of the drift."""


def measure_inputs(linear: str, visit: Visit, options: SumOptions) -> tuple[InputStatistics, ...]:
    """Run the block, as it was and as it is, up to `linear` on every batch.

    Args:
        linear: Name of the first of the linears that share the input.
        visit: The block where the walk stands.
        options: What is summed.
    """
    totals = Totals()
    device: torch.device | str = "cpu"
    for place, moments in sum_inputs(linear, visit, options):
        device = moments.sums["xx"].device  # at last that of the block
        totals.add(place, moments)
    return totals.statistics(options.groups, options.activation, device)


class SumPlace(NamedTuple):
    """Which tokens a sum is over; sums are added up in this order."""

    group: int
    """Of output channels, whose weights the tokens have."""
    held_out: bool
    chunk: int
    """Of the samples."""


class Totals:
    """The sums of all chunks, added up as they come: those of the same tokens in order."""

    def __init__(self) -> None:
        self._of: defaultdict[tuple[int, bool], OrderedTotal] = defaultdict(OrderedTotal)

    def add(self, place: SumPlace, moments: Moments) -> None:
        """Add the sums of a chunk; they belong to this object then."""
        self._of[place.group, place.held_out].add(moments)

    def statistics(
        self,
        groups: RowGroups | None,
        activation: ActivationScheme | None,
        device: torch.device | str,
    ) -> tuple[InputStatistics, ...]:
        """Return the statistics of each group of output channels, once.

        Args:
            groups: Of output channels; None: there is one.
            activation: How the inputs were quantized.
            device: Where the statistics are to be.
        """
        edges = [slice(None)]
        if groups is not None:
            edges = [slice(first, last) for first, last in pairwise(groups.edges)]
        found = []
        for group, rows in enumerate(edges):
            train, held_out = (self._of.pop((group, part)).moments() for part in (False, True))
            count = train.num_tokens
            effective = count if groups is None else groups.effective(group, count)
            train, held_out = train.on(device), held_out.on(device)
            found.append(InputStatistics(rows, train, held_out, effective, activation))
        return tuple(found)


def sum_inputs(
    linear: str, visit: Visit, options: SumOptions
) -> Iterator[tuple[SumPlace, Moments]]:
    """Yield the sums of each chunk of the samples, in order; arguments as of `measure_inputs`.

    All but the last are off the card.
    """
    sums: dict[SumPlace, Moments] = {}
    start, streams = 0, visit.streams
    residual, activation = options.residual, options.activation
    for index, (first, second) in enumerate(zip(streams.original, streams.quantized, strict=True)):
        number, held_out = streams.chunk_of(index), index >= streams.num_train
        if visit.chunk not in (None, number):
            continue
        if SumPlace(0, held_out, number) not in sums:
            for place in list(sums):  # they are complete
                yield place, sums.pop(place).on("cpu")
        reference, meant = _see(visit.original, linear, first, index, residual)
        x, there = reference, meant
        if first is not second:
            x, there = _see(visit.quantized, linear, second, index, residual)
        x = x if activation is None else fake_quantize(x, activation)
        drift, lost = reference - x, _lost(meant, there, x.dtype)
        limit = options.token_cap
        cap = None if limit is None else hessian.token_weights(x, limit)
        tokens = slice(start, start := start + len(x))
        among = options.groups.among(tokens, x.device) if options.groups else ALL_ALIKE
        for group, (rows, root) in enumerate(among):
            key, part = SumPlace(group, held_out, number), None if lost is None else lost[:, rows]
            if key not in sums:
                width = None if part is None else part.shape[-1]
                sums[key] = no_moments(x.shape[-1], width, device=x.device, for_errors=held_out)
            factor = cap if root is None else root if cap is None else cap * root
            residuals = None if part is None else _times(part, factor)
            sums[key].add(_times(x, factor), _times(drift, factor), residuals)
    yield from sums.items()


def _lost(meant: Tensor | None, there: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if meant is None or there is None:
        return None
    return (meant.float() - there.float()).to(dtype)


def _times(values: Tensor, factor: Tensor | None) -> Tensor:
    return values if factor is None else (factor * values).to(values.dtype)


def _see(
    block: Block, linear: str, hidden: Tensor, batch: int, residual: tuple[str, str] | None
) -> tuple[Tensor, Tensor | None]:
    """Return the input of a linear and the residual stream that its output is added to."""
    of_attention, of_mlp = residual or (None, None)
    if linear == of_mlp:
        return block.around(linear, hidden, batch)
    inputs = block.inputs_of(linear, hidden, batch)
    if linear == of_attention:
        return inputs, hidden.flatten(0, -2).to(inputs.device, non_blocking=True)
    return inputs, None
