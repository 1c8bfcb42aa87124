"""Who does which task, and what happens when somebody ends: the same for all engines.

A worker sits on a seat; when it ends another takes its seat. An engine brings tasks to seats and
says what came of them; all that is decided is decided here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from qtool.engines import Sent, Task
from qtool.errors import EngineError, QtoolError
from qtool.wording import reason

OF_ONE_MACHINE = (OSError, MemoryError)
"""Errors that another machine might not have; of memory torch's own are told by their text."""


@dataclass(frozen=True, slots=True)
class SeatNews:
    """What became of a seat."""

    seat: int
    value: Any = None
    """What its function returned."""
    error: Exception | None = None
    """What it raised."""
    lost: str | None = None
    """Why its worker is no more; None: it lives."""
    is_new: bool = False
    """A worker has taken the seat."""


class Seats(Protocol):
    """The workers of an engine."""

    count: int
    patience: float
    """Seconds to wait for a worker when none is left."""

    def taken(self) -> set[int]:
        """Return the seats whose workers wait for a task."""
        ...

    def send(self, seat: int, function: Callable[[Any], Any], argument: Sent) -> None:
        """Give a worker that waits something to do."""
        ...

    def listen(self, timeout: float | None, only: int | None = None) -> SeatNews | None:
        """Wait for the next thing to be told; None: nothing was, in so many seconds.

        With `only`, what that seat tells of its task, and of others that their workers are new.
        """
        ...


def scheduled(
    seats: Seats,
    function: Callable[[Any], Any],
    tasks: Sequence[Task],
    *,
    in_place: bool,
    tries: int,
) -> Iterator[Any]:
    """Yield the results of all tasks in their order; see `Pool.map`."""
    state = _Course(seats, tasks, in_place, tries)
    for number in range(len(tasks)):
        while number not in state.results:
            state.hand_out(function)
            only = state.whose(number) if in_place else None
            state.take(seats.listen(None if state.running else seats.patience, only))
        yield state.results.pop(number)


@dataclass(slots=True)
class _Course:
    """Where a map stands."""

    seats: Seats
    tasks: Sequence[Task]
    in_place: bool
    tries: int
    results: dict[int, Any] = field(default_factory=dict)
    waiting: list[int] = field(init=False)
    running: dict[int, int] = field(default_factory=dict)
    """The task of each seat that has one."""
    begun: dict[int, int] = field(default_factory=dict)
    """How often each was."""

    def __post_init__(self) -> None:
        self.waiting = sorted(range(len(self.tasks)), key=lambda n: -self.tasks[n].cost)

    def hand_out(self, function: Callable[[Any], Any]) -> None:
        """Give all that wait something to do, if there is something for them."""
        there = self.seats.taken()
        for seat in sorted(there - set(self.running)):
            number = self._next(seat, there | set(self.running))
            if number is not None:
                self.waiting.remove(number)
                self.running[seat] = number
                self.begun[number] = self.begun.get(number, 0) + 1
                self.seats.send(seat, function, self.tasks[number].argument)

    def _next(self, seat: int, living: set[int]) -> int | None:
        """Return a task for a seat: its own first, else one whose own seat nobody has."""
        if not self.in_place:
            return self.waiting[0] if self.waiting else None
        homes = {number: number % self.seats.count for number in self.waiting}
        own = (number for number, home in homes.items() if home == seat)
        lost = (number for number, home in homes.items() if home not in living)
        return next(own, next(lost, None))

    def whose(self, wanted: int) -> int | None:
        """Return the seat that has a task; None: nobody has."""
        return next((seat for seat, number in self.running.items() if number == wanted), None)

    def take(self, told: SeatNews | None) -> None:
        """Note what was told."""
        if told is None:
            names = ", ".join(self.tasks[number].name for number in self.waiting[:3])
            raise EngineError(
                f"No worker is left for {names}, and none came within {self.seats.patience:g} s. "
                "Start nodes again, and go on with --resume."
            )
        if told.is_new or told.seat not in self.running:
            return
        number = self.running.pop(told.seat)
        if told.error is None and told.lost is None:
            self.results[number] = told.value
            return
        if told.error is not None and not _is_of_one_machine(told.error):
            raise told.error
        self.waiting.insert(0, number)
        if self.begun[number] >= self.tries:
            raise EngineError(self._given_up(number, told)) from told.error

    def _given_up(self, number: int, told: SeatNews) -> str:
        name, times = self.tasks[number].name, f"{self.begun[number]} times"
        if told.error is not None:
            what = reason(told.error) if isinstance(told.error, OSError) else str(told.error)
            return f"{name} failed {times}, at last with: {what} Go on with --resume."
        return (
            f"The worker of {name} ended {times}, at last {told.lost}. It may be short of memory: "
            "use fewer workers on a machine, and go on with --resume."
        )


def _is_of_one_machine(error: Exception) -> bool:
    if isinstance(error, QtoolError):
        return False
    return isinstance(error, OF_ONE_MACHINE) or "memory" in str(error)
