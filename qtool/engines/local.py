"""This machine: one worker is this process; several are processes, one per card or core.

concurrent.futures gives up all of its processes when one ends, and has no place for a task that
finds its worker's memory again; so the processes are ours.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from qtool.core.threads import num_threads
from qtool.engines import Pool, Sent, Shared, Task, WorkEngine, Workers
from qtool.engines._pickling import dumps, loads, read_pickle, write_pickle
from qtool.engines._scheduling import SeatNews, scheduled
from qtool.engines._worker import Remembered, answer, card_of_seat, use_card
from qtool.errors import EngineError


def _check(workers: Workers) -> None:
    if workers.address is not None:
        raise EngineError(
            "--address is of a cluster, and the engine 'local' has none. Use --engine ray, or "
            "leave it out."
        )


@contextmanager
def _open(workers: Workers) -> Iterator[Pool]:
    count = workers.count or _count(workers)
    with num_threads(workers.threads):
        if count == 1:
            yield _Here()
            return
        with tempfile.TemporaryDirectory(prefix="qtool-shared-") as folder:
            pool = _Processes(count, workers, Path(folder))
            try:
                yield pool
            finally:
                pool.end()


def _card(seat: int) -> int:
    """Return the card of a worker; this process may have been told to use another than 0."""
    import torch

    return card_of_seat(seat, torch.cuda.device_count(), torch.cuda.current_device())


def _count(workers: Workers) -> int:
    if workers.device.startswith("cuda"):
        import torch

        return torch.cuda.device_count()
    return max(1, len(os.sched_getaffinity(0)) // workers.threads)


@dataclass(frozen=True, slots=True)
class _Value:
    """A value of this process."""

    value: Any

    def get(self) -> Sent:
        return self.value


class _Here:
    """One worker, which is this process."""

    count = 1

    def map(
        self,
        function: Callable[[Any], Any],
        tasks: Sequence[Task],
        *,
        in_place: bool = False,  # noqa: ARG002 - there is one place
    ) -> Iterator[Any]:
        for task in tasks:
            yield function(task.argument)

    @contextmanager
    def share(self, value: Sent) -> Iterator[Shared]:
        yield _Value(value)


@dataclass(frozen=True, slots=True)
class _File:
    """A value in a file."""

    path: Path

    def get(self) -> Sent:
        return _seen.get(str(self.path), lambda: read_pickle(self.path))


_seen = Remembered()


@dataclass(slots=True)
class _Process:
    """A worker, and our end of its pipe."""

    process: Any
    pipe: Connection
    is_busy: bool = False


class _Processes:
    """Workers that are processes; a seat whose process ends gets another one at once."""

    patience = 600.0

    def __init__(self, count: int, workers: Workers, folder: Path) -> None:
        self.count = count
        self._workers, self._folder = workers, folder
        self._shared = 0
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(workers.modules))  # imported once for all
        self._seats = [self._start(seat) for seat in range(count)]

    def _start(self, seat: int) -> _Process:
        ours, theirs = self._context.Pipe()
        workers = self._workers
        card = _card(seat) if workers.device.startswith("cuda") else None
        process = self._context.Process(
            target=_serve, args=(theirs, workers.threads, card), daemon=True
        )
        process.start()
        theirs.close()
        return _Process(process, ours)

    def map(
        self, function: Callable[[Any], Any], tasks: Sequence[Task], *, in_place: bool = False
    ) -> Iterator[Any]:
        try:
            yield from scheduled(
                self, function, tasks, in_place=in_place, tries=self._workers.tries
            )
        finally:
            for seat, worker in enumerate(self._seats):
                if worker.is_busy:  # nobody waits for it any more
                    self._replace(seat)

    def taken(self) -> set[int]:
        return {seat for seat, worker in enumerate(self._seats) if not worker.is_busy}

    def send(self, seat: int, function: Callable[[Any], Any], argument: Sent) -> None:
        worker = self._seats[seat]
        worker.is_busy = True
        with suppress(BrokenPipeError, ConnectionResetError):  # `listen` finds that it has ended
            worker.pipe.send_bytes(dumps((function, argument)))

    def listen(self, timeout: float | None, only: int | None = None) -> SeatNews | None:
        pipes = {id(worker.pipe): seat for seat, worker in enumerate(self._seats)}
        asked = self._seats if only is None else [self._seats[only]]
        ready = wait([worker.pipe for worker in asked if worker.is_busy], timeout)
        if not ready:
            return None
        seat = pipes[id(ready[0])]
        try:
            value, error = loads(self._seats[seat].pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            return SeatNews(seat, lost=self._replace(seat))
        self._seats[seat].is_busy = False
        return SeatNews(seat, value, error)

    def _replace(self, seat: int) -> str:
        """Put another process in the place of one; return how that ended."""
        worker = self._seats[seat]
        worker.pipe.close()
        if worker.process.is_alive():
            worker.process.join(1)
        if worker.process.is_alive():
            worker.process.kill()
        worker.process.join()
        self._seats[seat] = self._start(seat)
        return f"with exit status {worker.process.exitcode}"

    @contextmanager
    def share(self, value: Sent) -> Iterator[Shared]:
        self._shared += 1
        path = self._folder / f"{self._shared}.pickle"
        try:
            write_pickle(value, path)
            yield _File(path)
        finally:
            path.unlink(missing_ok=True)

    def end(self) -> None:
        """End all of them; a map that an error has left then finds nobody to replace."""
        seats, self._seats = self._seats, []
        for worker in seats:
            worker.pipe.close()
            worker.process.kill()
            worker.process.join()


def _serve(pipe: Connection, threads: int, card: int | None) -> None:
    """Do what comes through a pipe until nobody is at its other end."""
    use_card(card)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        while True:
            content = pipe.recv_bytes()
            pipe.send_bytes(answer(partial(loads, content), threads, dumps))


ENGINE = WorkEngine(
    summary="This machine: processes, one per card, or per core without a card.",
    check=_check,
    open=_open,
)
