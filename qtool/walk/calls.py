"""What blocks are called with beside their input, kept once per distinct value."""

from collections.abc import Callable, MutableMapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from qtool.walk.stand_in import StandIn, as_output

Side = Literal["original", "quantized"]
"""The model as it was, or as far as it is quantized."""


@dataclass(frozen=True, slots=True, eq=False)
class HandedOn:
    """A mapping in which blocks leave keys and values for later ones (Gemma 3n, Gemma 4).

    It isn't the same in the model as it was and in the quantized one.
    """

    original: MutableMapping[Any, Any]
    quantized: MutableMapping[Any, Any]


class Call(NamedTuple):
    """What a block is called with beside its input: masks, positions, rotary embeddings."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def of(self, side: Side) -> "Call":
        """Return the call of one model."""
        return mapped(self, _as_it_is, handed=lambda one: getattr(one, side, one))

    @property
    def hands_on(self) -> bool:
        """Whether later blocks read what this one leaves beside its output."""
        found: list[Any] = []
        mapped(self, _as_it_is, handed=found.append)
        return bool(found)

    def on(self, device: torch.device) -> "Call":
        """Return the call with all tensors on a device."""
        return mapped(self, lambda _place, tensor: tensor.to(device, non_blocking=True))

    def of_samples(self, samples: slice, count: int) -> "Call":
        """Return the call for some of a batch's `count` samples.

        What has two dimensions and more, and as many entries of the first, is of samples.
        """

        def some(_place: str, tensor: Tensor) -> Tensor:
            return tensor[samples] if tensor.dim() > 1 and len(tensor) == count else tensor

        def of_some(handed: MutableMapping[Any, Any]) -> MutableMapping[Any, Any]:
            fewer = copy(handed)  # what is left there for later blocks is left by all samples
            fewer.update({key: mapped(item, some) for key, item in handed.items()})
            return fewer

        return mapped(self, some, handed=of_some)

    def likeness(self) -> Any:  # noqa: ANN401
        """Return what is equal for calls with the very same tensors, and equal other values."""
        return mapped(self, lambda _place, tensor: id(tensor), handed=id)


def _as_it_is(_place: str, tensor: Tensor) -> Tensor:
    return tensor


def mapped(
    value: Any,  # noqa: ANN401
    change: Callable[[str, Tensor], Any],
    place: str = "",
    *,
    handed: Callable[[Any], Any] = lambda one: one,
) -> Any:  # noqa: ANN401
    """Return a nested value with every tensor replaced; `change` is told where it stands.

    What blocks share, a mapping that is no plain dictionary or a `HandedOn`, `handed` replaces.
    """
    if isinstance(value, Tensor):
        return change(place, value)
    if type(value) is dict:
        items = value.items()
        return {key: mapped(it, change, f"{place}.{key}", handed=handed) for key, it in items}
    if isinstance(value, (tuple, list)):
        parts = [mapped(it, change, f"{place}.{i}", handed=handed) for i, it in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return handed(value) if isinstance(value, MutableMapping | HandedOn) else value


@dataclass(slots=True)
class Calls:
    """The calls of all blocks for all batches.

    Masks, positions and rotary embeddings are the same for all blocks of a kind and for all batches
    of a shape: one tensor stands for all of them. What differs from batch to batch, such as the
    per-layer inputs of Gemma 4, is kept for each, off the card.
    """

    _calls: list[list[Call]] = field(default_factory=list)
    _first: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def add(self, calls: list[Call]) -> None:
        """Keep what the blocks were called with for one more batch."""
        seen: dict[int, Tensor] = {}
        shared: dict[int, HandedOn] = {}

        def keep(place: str, tensor: Tensor) -> Tensor:
            if id(tensor) not in seen:
                seen[id(tensor)] = self._shared(place, tensor)
            return seen[id(tensor)]

        def pair(handed: MutableMapping[Any, Any]) -> HandedOn:
            return shared.setdefault(id(handed), HandedOn(handed, copy(handed)))

        self._calls.append(
            [mapped(call, keep, str(block), handed=pair) for block, call in enumerate(calls)]
        )

    def _shared(self, place: str, tensor: Tensor) -> Tensor:
        """Return what was kept for the first batch if it has the same values."""
        key = (place, tuple(tensor.shape), tensor.dtype)
        first = self._first.setdefault(key, tensor)
        return first if first is tensor or torch.equal(first, tensor) else tensor.cpu()

    def of(self, block: int) -> tuple[Call, ...]:
        """Return the calls of a block, batch by batch."""
        return tuple(calls[block] for calls in self._calls)


Note = Callable[[Tensor, Call], tuple[Any, ...] | None]


class Recorder(StandIn):
    """Notes what a block is called with, and returns its input as a block would.

    `note` says what follows the hidden states in a block's output; None: the output is no tuple.
    """

    def __init__(self, block: nn.Module, note: Note) -> None:
        super().__init__(block)
        self._note = note

    def forward(self, hidden: Tensor, *arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401
        """Return what the block would, its input in place of its output."""
        return as_output(hidden, self._note(hidden, Call(arguments, keywords)))
