"""What a worker does with a task, in whatever process it runs."""

import importlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from qtool.core.threads import num_threads
from qtool.engines import Sent
from qtool.engines._pickling import dumps, loads

Packed = TypeVar("Packed")
VALUES_KEPT = 2
"""Shared values that a worker keeps: one of the run, and one of what it works at."""


class Remembered:
    """The shared values that a worker has read last."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def get(self, key: str, read: Callable[[], Any]) -> Sent:
        """Return a value, read if it isn't known."""
        value = self._values.pop(key) if key in self._values else read()
        self._values[key] = value
        while len(self._values) > VALUES_KEPT:
            del self._values[next(iter(self._values))]
        return value


def import_ahead(modules: Iterable[str]) -> None:
    """Import what tasks will need."""
    for name in modules:
        importlib.import_module(name)


def card_of_seat(seat: int, cards: int, own: int) -> int:
    """Return the card of a worker: the first has this process's `own`, others those after it.

    More workers than cards share them as evenly as they can.
    """
    return (own + seat) % cards


def use_card(number: int | None) -> None:
    """Let this process compute on a card, which `cuda` means from now on; None: it needs none."""
    if number is not None:
        import torch

        torch.cuda.set_device(number)


def answer(read: Callable[[], Any], threads: int, write: Callable[[Any], Packed]) -> Packed:
    """Return what came of a call: (what it returned, what it raised), of which one is None.

    Args:
        read: Gives the function and its argument.
        threads: That torch may use.
        write: Makes of a value what goes back.
    """
    try:
        with num_threads(threads):
            function, argument = read()
            return write((function(argument), None))
    except Exception as error:  # noqa: BLE001 - whatever it is, who asked for it is told
        error.__traceback__ = error.__cause__ = error.__context__ = None
        return write((None, _that_can_be_told(error)))


def _that_can_be_told(error: Exception) -> Exception:
    try:
        loads(dumps(error))
    except Exception:  # noqa: BLE001 - an error of some library that no other process can have
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
