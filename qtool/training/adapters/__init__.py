"""Kinds of adapters: what learns beside a quantized model whose planes are frozen.

One file per kind, constant ADAPTER; the command line calls it by the file's name, with `-` for `_`.
A kind puts into the model what learns and says at the end what an adapter stores of it
(`checkpoint.adapter`). The loop and its loss, `training.adapting`, are the same for all.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from qtool import plugins
from qtool.base import CausalModel
from qtool.checkpoint.adapter import LayerAdapter
from qtool.training.adapting import ExerciseBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptable:
    """What a kind of adapter is put into."""

    model: CausalModel
    """A loaded checkpoint of qtool; nothing in it learns."""
    linears: Mapping[str, Any]
    """Its quantized linears by name: what has `stored()`, `bias`, and an `entry`."""
    original: Callable[[str], Tensor] | None = None
    """(name) -> the weight that was quantized, (out_features, in_features) float32; None: nobody
    has given the original."""
    exercises: Sequence[ExerciseBatch] = ()
    """Some of what will be learned, one by one, not filled up."""
    surprise: Callable[[ExerciseBatch], Tensor]
    """The loss, summed, in nats."""
    tell: Callable[[str], None] = lambda _text: None
    """Is told what goes on before learning begins."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """What learns, and how it is stored."""

    parameters: Sequence[nn.Parameter]
    stored: Callable[[], dict[str, LayerAdapter]]
    """What an adapter has of it now, by layer."""
    remove: Callable[[], None]
    """Takes out of the model what was put in."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What was decided, such as ranks: goes into the adapter's manifest."""

    @property
    def num_parameters(self) -> int:
        """Return how many numbers learn."""
        return sum(parameter.numel() for parameter in self.parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterKind:
    """The extension point: one file in `qtool/training/adapters` with the constant ADAPTER."""

    summary: str
    """One sentence for `qtool adapt --help`."""
    options: type
    """Frozen dataclass of what can be set."""
    install: Callable[[Adaptable, Any], Installed]
    learning_rate: float
    """If nobody says another."""


def load_kind(name: str) -> AdapterKind:
    """Return a kind by name.

    Raises:
        UnknownNameError: there is none of that name.
    """
    return plugins.load_named(sys.modules[__name__], name, "ADAPTER", AdapterKind, "adapters")
