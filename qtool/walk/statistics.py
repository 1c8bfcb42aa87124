"""What a group of linears that share an input sees: one pass over the cached block inputs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.core import hessian
from qtool.core.activations import fake_quantize
from qtool.core.moments import Moments, Shifter, merged_in_order, no_moments
from qtool.modeling.source import ModelSource
from qtool.scheme import ActivationScheme
from qtool.walk.filled_block import Block
from qtool.walk.streams import Visit

FEW_TOKENS = 4
"""Below this many tokens per input the Hessian is noise in many directions: warn, damp more."""
DEFAULT_DAMPING = 0.01


@dataclass(frozen=True, slots=True)
class RowGroups:
    """Output channels of a linear in groups, for which the tokens differ in weight."""

    edges: tuple[int, ...]
    """Where each begins, and last the number of channels."""
    weights: Tensor
    """(tokens, groups) float16, of all tokens in the order of the streams; their mean over the
    tokens that are solved with is one."""

    def among(self, tokens: slice, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows of each group, and the roots of its weights of some tokens.

        Tokens multiplied by these have products that are weighed: (tokens, 1) float32.
        """
        roots = self.weights[tokens].to(device).float().sqrt().unsqueeze(-1).unbind(1)
        for (first, last), root in zip(pairwise(self.edges), roots, strict=True):
            yield slice(first, last), root

    def effective(self, group: int, num_tokens: int) -> float:
        """Return how many tokens of equal weight say as much as the first ones of a group.

        Gradients of queries and keys can be those of a few tokens: one in a hundred.
        """
        weights = self.weights[:num_tokens, group].double()
        return float(weights.sum() ** 2 / weights.square().sum())


@dataclass(frozen=True)
class InputStatistics:
    """Second moments of the tokens that are solved with, and of those that choices are made on."""

    rows: slice
    """Output channels that they are for."""
    train: Moments
    held_out: Moments
    num_effective: float
    """Training tokens, of equal weight, that say as much as those that there are."""
    activation: ActivationScheme | None = None
    """How the inputs were quantized before they were measured; None: they weren't."""
    is_for_one: bool = False
    """They are of one linear: once its weight is shifted, what that took can go."""

    @property
    def tokens_per_input(self) -> float:
        """How many training tokens there are, in effect, for each input."""
        return self.num_effective / len(self.train.sums["xx"])

    def is_finite(self) -> bool:
        """Return whether no input and no residual stream left the range of its dtype."""
        return all(
            bool(torch.isfinite(total).all())
            for part in (self.train, self.held_out)
            for product, total in part.sums.items()
            if product in ("xx", "dx", "ex")
        )

    def on(self, device: torch.device | str) -> "InputStatistics":
        """Return the same with the moments on a device."""
        return replace(self, train=self.train.on(device), held_out=self.held_out.on(device))

    @cached_property
    def shifter(self) -> Shifter:
        """What shifts the weights of all linears with this input."""
        damping = raised(DEFAULT_DAMPING, self.tokens_per_input)
        lower = hessian.cholesky(hessian.damp(self.train.mean("xx"), damping))
        return Shifter(self.train, self.held_out, lower)

    def shifted(self, weight: Tensor, strength: float | None) -> tuple[Tensor, float]:
        """Return a weight for these inputs, as `Shifter.shift` does; of one linear only once.

        Args:
            weight: (rows, in_features) float32.
            strength: Of the shift, in [0, 1]; None: the best on the held-out tokens.
        """
        found = self.shifter.shift(weight, strength)
        if self.is_for_one:  # for the widest layers each matrix is a gigabyte, or three
            self.train.keep("xx")
            del self.__dict__["shifter"]
        return found


def raised(damping: float, tokens_per_input: float) -> float:
    """Return the damping asked for, raised where there are few tokens per input."""
    if tokens_per_input >= FEW_TOKENS:
        return damping
    return min(damping * FEW_TOKENS / max(tokens_per_input, 0.1), hessian.MAX_DAMPING)


def why_not_finite(source: ModelSource, linear: str, dtype: torch.dtype) -> str:
    """Return the sentence about inputs that aren't finite: the model's own values come first."""
    problem = f"The inputs of {linear} hold NaN or infinity"
    for name in source.names():
        values = source.read(name)
        odd = int((~torch.isfinite(values)).sum()) if values.is_floating_point() else 0
        if odd:
            return (
                f"{problem}, because {odd} of {values.numel()} values of {name} in the model's "
                "file do. It is damaged, or the model overflowed when it was saved."
            )
    if dtype == torch.float32:
        return (
            f"{problem}, though all stored values are finite and float32 is the widest dtype: "
            "config.json may be another model's. Otherwise use more bits or smaller groups."
        )
    return (
        f"{problem}: the model leaves the range of {str(dtype).removeprefix('torch.')}, in which "
        "it is walked. Set calibration.dtype to float32, or use more bits or smaller groups."
    )


ALL_ALIKE = ((slice(None), None),)
"""Rows, and weights of the tokens there, where there is one group of rows."""


def measure_inputs(
    linear: str,
    visit: Visit,
    *,
    residual: tuple[str, str] | None,
    token_cap: float | None,
    groups: RowGroups | None = None,
    activation: ActivationScheme | None = None,
) -> tuple[InputStatistics, ...]:
    """Run the block, as it was and as it is, up to `linear` on every batch.

    Args:
        linear: Name of the first of the linears that share the input.
        visit: The block where the walk stands.
        residual: Linears whose outputs go into the residual stream, of attention, then of the MLP;
            None: no residual stream is looked at.
        token_cap: Tokens above this multiple of the median norm are shrunk to it; None: none are.
        groups: Of output channels, each measured with its weights of the tokens, drifts too;
            None: all channels are one, and so are all weights.
        activation: How the inputs are quantized; what that costs is a part of the drift.
    """
    sums = sum_inputs(
        linear,
        visit,
        residual=residual,
        token_cap=token_cap,
        groups=groups,
        activation=activation,
    )
    last = next(reversed(sums.values()))  # the one that wasn't set aside
    return statistics_of(sums, groups, activation, last.sums["xx"].device)


class SumPlace(NamedTuple):
    """Which tokens a sum is over; sums are added up in this order."""

    group: int
    """Of output channels, whose weights the tokens have."""
    held_out: bool
    chunk: int
    """Of the samples."""


def statistics_of(
    sums: Mapping[SumPlace, Moments],
    groups: RowGroups | None,
    activation: ActivationScheme | None,
    device: torch.device | str,
) -> tuple[InputStatistics, ...]:
    """Add up the sums of all chunks, and return the statistics of each group of output channels.

    Args:
        sums: Of all chunks that the samples have.
        groups: Of output channels; None: there is one.
        activation: How the inputs were quantized.
        device: Where the statistics are to be.
    """

    def total(group: int, *, held_out: bool) -> Moments:
        wanted = sorted(place for place in sums if place[:2] == (group, held_out))
        return merged_in_order([sums[place] for place in wanted]).on(device)

    edges = [slice(None)]
    if groups is not None:
        edges = [slice(first, last) for first, last in pairwise(groups.edges)]
    found = []
    for group, rows in enumerate(edges):
        train, held_out = total(group, held_out=False), total(group, held_out=True)
        count = train.num_tokens
        effective = count if groups is None else groups.effective(group, count)
        found.append(InputStatistics(rows, train, held_out, effective, activation))
    return tuple(found)


def sum_inputs(
    linear: str,
    visit: Visit,
    *,
    residual: tuple[str, str] | None,
    token_cap: float | None,
    groups: RowGroups | None = None,
    activation: ActivationScheme | None = None,
) -> dict[SumPlace, Moments]:
    """Return the sums of each chunk of the samples; see `measure_inputs`.

    Of several chunks those that are complete wait off the card.
    """
    sums: dict[SumPlace, Moments] = {}
    start, streams = 0, visit.streams
    for index, (first, second) in enumerate(zip(streams.original, streams.quantized, strict=True)):
        reference, meant = _see(visit.original, linear, first, index, residual)
        x, there = reference, meant
        if first is not second:
            x, there = _see(visit.quantized, linear, second, index, residual)
        x = x if activation is None else fake_quantize(x, activation)
        drift, lost = reference - x, _lost(meant, there, x.dtype)
        cap = None if token_cap is None else hessian.token_weights(x, token_cap)
        held_out = index >= streams.num_train
        tokens = slice(start, start := start + len(x))
        found = ALL_ALIKE if groups is None else groups.among(tokens, x.device)
        for group, (rows, root) in enumerate(found):
            key, part = SumPlace(group, held_out, streams.chunk_of(index)), None
            if lost is not None:
                part = lost[:, rows]
            if key not in sums:
                _set_aside(sums, key)
                width = None if part is None else part.shape[-1]
                sums[key] = no_moments(x.shape[-1], width, device=x.device, for_errors=held_out)
            factor = cap if root is None else root if cap is None else cap * root
            residuals = None if part is None else _times(part, factor)
            sums[key].add(_times(x, factor), _times(drift, factor), residuals)
    return sums


def _set_aside(sums: dict[SumPlace, Moments], new: SumPlace) -> None:
    """Move the sums of the chunk before a new one off the card: they are complete."""
    for place, total in sums.items():
        if place.group == new.group and place != new:
            sums[place] = total.on("cpu")


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
