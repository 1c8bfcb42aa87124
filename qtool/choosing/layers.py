"""One choice for each layer, as cheap as a budget of bytes allows: exactly, by integer programming.

Prices add up over layers (to second order the divergence does, but for what the errors of two
layers have in common), so this is a knapsack with one choice per group of layers (MCKP). It is
solved to optimality by HiGHS, through `scipy.optimize.milp`; the same input has the same answer.
"""

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from math import gcd, inf
from pathlib import Path

import numpy as np

from qtool.errors import RecipeError

OUT = 1
"""What C, too, knows as stdout."""
LARGEST_PRICE = 1e6
"""As the solver sees prices: it stops where a millionth of one is left to gain."""


@dataclass(frozen=True, slots=True)
class PricedLayer:
    """A layer and what each of its choices costs; layers of one group have the same choices."""

    name: str
    group: str
    """Layers that take the same choice, such as queries, keys and values; neighbours in a list."""
    num_bytes: tuple[int, ...]
    """Stored, per choice."""
    prices: tuple[float, ...]
    """Per choice, in nats per token, not negative."""


@dataclass(frozen=True, slots=True)
class Margin:
    """What a layer's group would gain by its next wider choice, and lose by its next narrower one.

    In nats per token and per MiB of the group; None: there is no such choice.
    """

    gain: float | None
    loss: float | None


def allocate(layers: Sequence[PricedLayer], budget: int) -> dict[str, int]:
    """Return the choice of each layer, by name, with the least sum of prices within a budget.

    Args:
        layers: Those of one group stand side by side.
        budget: Bytes that all may take together.

    Raises:
        RecipeError: even the smallest choices take more.
    """
    groups = _groups(layers)
    least = sum(int(each.num_bytes.min()) for each in groups)
    if least > budget:
        raise RecipeError(f"The smallest choices take {least} bytes, and the budget is {budget}.")
    places = _solved(groups, budget)
    return {
        layer.name: place
        for group, place in zip(groups, places, strict=True)
        for layer in group.layers
    }


def margins(layers: Sequence[PricedLayer], chosen: Mapping[str, int]) -> dict[str, Margin]:
    """Return for each layer what one more choice of its group is worth, by name.

    The best of the wider choices counts, and the best of the narrower ones.
    """
    found = {}
    for group in _groups(layers):
        place = chosen[group.layers[0].name]
        more = (group.num_bytes - group.num_bytes[place]) / 2**20
        less = group.prices[place] - group.prices
        gains = [less[i] / more[i] for i in range(len(more)) if more[i] > 0]
        losses = [less[i] / more[i] for i in range(len(more)) if more[i] < 0]
        margin = Margin(max(gains, default=None), min(losses, default=None))
        found.update({layer.name: margin for layer in group.layers})
    return found


@dataclass(frozen=True, slots=True)
class _Group:
    layers: tuple[PricedLayer, ...]
    num_bytes: np.ndarray  # (choices,) int64
    prices: np.ndarray  # (choices,) float64


def _groups(layers: Sequence[PricedLayer]) -> list[_Group]:
    found = []
    for _, members in groupby(layers, lambda layer: layer.group):
        same = tuple(members)
        num_bytes = np.array([layer.num_bytes for layer in same], dtype=np.int64).sum(0)
        prices = np.array([layer.prices for layer in same], dtype=np.float64).sum(0)
        found.append(_Group(same, num_bytes, prices))
    return found


def _solved(groups: Sequence[_Group], budget: int) -> list[int]:
    """Return the place of each group's choice.

    The solver sees numbers of its own size: bytes above the smallest choice, in their greatest
    common divisor, and prices relative to the largest. What its tolerance lets through is checked
    in whole bytes, and the budget made so much tighter.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_diag, csr_array, vstack

    extra = np.concatenate([each.num_bytes - each.num_bytes.min() for each in groups])
    prices = np.concatenate([each.prices - each.prices.min() for each in groups])
    unit = gcd(*map(int, extra)) or 1
    room = (budget - sum(int(each.num_bytes.min()) for each in groups)) // unit
    extra = extra // unit
    one_each = block_diag([csr_array(np.ones((1, len(each.prices)))) for each in groups])
    rows = vstack([one_each, csr_array(extra[None].astype(np.float64))])
    ends = np.cumsum([len(each.prices) for each in groups])[:-1]
    scaled = prices * (LARGEST_PRICE / (prices.max() or 1.0))
    ones, allowed = np.ones(len(groups)), room
    while allowed >= 0:
        with _silenced():
            found = milp(
                scaled,
                integrality=np.ones_like(scaled),
                bounds=Bounds(0, 1),
                constraints=LinearConstraint(rows, [*ones, -inf], [*ones, allowed]),
                options={"mip_rel_gap": 0.0},
            )
        if found.x is None:
            break
        places = [int(part.argmax()) for part in np.split(found.x, ends)]
        taken = sum(int(part[i]) for part, i in zip(np.split(extra, ends), places, strict=True))
        if taken <= room:
            return places
        allowed -= taken - room
    return [int(each.num_bytes.argmin()) for each in groups]


@contextmanager
def _silenced() -> Iterator[None]:
    """Keep a line that HiGHS prints for its own developers out of results on stdout."""
    sys.stdout.flush()
    kept = os.dup(OUT)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), OUT)
            yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, OUT)
        os.close(kept)
