"""What a group of linears that share an input sees: one pass over the cached block inputs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from qtool.core import hessian
from qtool.core.moments import Moments, Shifter
from qtool.modeling.source import ModelSource
from qtool.scheme import ActivationScheme

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

    def of_rows(self, rows: slice) -> "InputStatistics":
        """Return them for some rows of a linear that is solved in parts."""
        train, held_out = self.train.of_rows(rows), self.held_out.of_rows(rows)
        part = replace(self, rows=rows, train=train, held_out=held_out, is_for_one=False)
        part.__dict__["lower"] = self.lower  # it is the same, and dear
        return part

    @cached_property
    def lower(self) -> Tensor | None:
        """Cholesky factor of the damped Hessian, by which weights are shifted; None: has none."""
        damping = raised(DEFAULT_DAMPING, self.tokens_per_input)
        return hessian.cholesky(hessian.damp(self.train.mean("xx"), damping))

    def shifted(self, weight: Tensor, strength: float | None) -> tuple[Tensor, float]:
        """Return a weight for these inputs, as `Shifter.shift` does; of one linear only once.

        Args:
            weight: (rows, in_features) float32.
            strength: Of the shift, in [0, 1]; None: the best on the held-out tokens.
        """
        found = Shifter(self.train, self.held_out, self.lower).shift(weight, strength)
        if self.is_for_one:  # for the widest layers each matrix is a gigabyte, or three
            self.train.keep("xx")
            del self.__dict__["lower"]
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
