"""Engines: what maps a pure function over tasks, in one process, in several, or on many machines.

One file per engine, its file's name is its name on the command line, constant ENGINE. The steps
know only `Pool`: results come in the order of the tasks, and where a task ran leaves no trace in
its result. So a worker may end at any time, and its task runs again somewhere else.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from qtool import plugins

Sent = Any  # to a worker, or back: whatever pickle takes


@dataclass(frozen=True, slots=True)
class Task:
    """One call of the function that is mapped."""

    name: str
    """Of what is done, for messages: a layer, or a share of the samples."""
    argument: Sent
    """What the function is called with; picklable."""
    cost: float = 0.0
    """In any unit: what costs most is begun first, so that nobody waits for it at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """What tasks run on."""

    count: int | None = None
    """How many at once; None: as many as there are cards, or else cores."""
    threads: int = 1
    """Of each on a CPU. Another number sums in another order, so it is a part of what decides a
    result."""
    device: str = "cpu"
    """Of each: `cpu`, or `cuda` for a card of its own."""
    address: str | None = None
    """Of a cluster that runs already; None: this machine alone."""
    modules: tuple[str, ...] = ()
    """That workers import before the first task, to save time."""
    tries: int = 5
    """How often a task is begun before the run ends because of it."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Which engine, and what workers a user asks it for."""

    name: str
    workers: Workers = Workers()


class Shared(Protocol):
    """A value that many tasks need; picklable, and small as a part of their arguments."""

    def get(self) -> Sent:
        """Return the value; it must not be changed."""
        ...


class Pool(Protocol):
    """Workers that are there."""

    count: int
    """How many."""

    def map(
        self, function: Callable[[Any], Any], tasks: Sequence[Task], *, in_place: bool = False
    ) -> Iterator[Any]:
        """Yield what a function returns for each task, in their order, as soon as it is known.

        Args:
            function: Of a module; pure: a task that was begun twice gives the same twice. What it
                returns is picklable.
            tasks: What to call it for.
            in_place: The n-th task of every such call goes to the same worker, as long as that
                lives: it may keep what saves it time. It is given another when its result has been
                yielded, so that large results wait with workers.

        Raises:
            EngineError: a task's worker ended again and again, or no worker is left.
            QtoolError: what the function raises, unless it is of one machine, such as a full disk:
                then the task is tried elsewhere first.
        """
        ...

    def share(self, value: Sent) -> AbstractContextManager[Shared]:
        """Put a value where all workers find it, until the block is left."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkEngine:
    """The extension point: one file in `qtool/engines` with the constant ENGINE."""

    summary: str
    """One sentence for the documentation."""
    check: Callable[[Workers], None]
    """Raises `QtoolError` if there can't be such workers: found before anything is begun."""
    open: Callable[[Workers], AbstractContextManager[Pool]]
    """Starts workers, and ends them when the block is left."""


def engine_names() -> tuple[str, ...]:
    """Return the sorted names of all engines."""
    return plugins.names(sys.modules[__name__])


def load_engine(name: str) -> WorkEngine:
    """Return an engine by name.

    Raises:
        UnknownNameError: there is none of that name.
    """
    return plugins.load(sys.modules[__name__], name, "ENGINE", WorkEngine)
