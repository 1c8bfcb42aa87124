"""Many machines: an actor of Ray per worker, on this machine or on a cluster that runs already.

Ray's own retries begin a task anew somewhere and forget what its worker had; so workers are actors,
and who does what is decided as for `local`. Values go through Ray's object store,
tensors as arrays, which it copies once into its memory and we once out of it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

from qtool.core.threads import num_threads
from qtool.engines import Pool, Sent, Shared, Task, WorkEngine, Workers
from qtool.engines._pickling import dumps_apart, loads_apart
from qtool.engines._scheduling import SeatNews, scheduled
from qtool.engines._worker import Remembered, answer, import_ahead
from qtool.errors import EngineError, MissingExtraError

FIRST_PATIENCE = 300.0
"""Seconds for the first workers to come."""


def _ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("--engine ray", "ray") from error
    return ray


def _check(_workers: Workers) -> None:
    _ray()


@contextmanager
def _open(workers: Workers) -> Iterator[Pool]:
    ray = _ray()
    began = not ray.is_initialized()
    if began:
        try:
            ray.init(address=workers.address, log_to_driver=False, include_dashboard=None)
        except Exception as error:
            where = workers.address or "this machine"
            raise EngineError(
                f"Ray can't be had at {where}: {' '.join(str(error).split())[:200]} Start it with "
                "'ray start --head', or leave out --address."
            ) from error
    pool = None
    try:
        with num_threads(workers.threads):
            pool = _Actors(ray, workers)
            yield pool
    finally:
        if pool is not None:
            pool.end()
        if began:
            ray.shutdown()


@dataclass(frozen=True, slots=True)
class _Stored:
    """A value in the object store, by the number of its reference.

    Ray has to hand on references itself, or nobody keeps what they refer to.
    """

    number: str

    def get(self) -> Any:  # noqa: ANN401
        return _seen.get(self.number, lambda: loads_apart(*_ray().get(_references[self.number])))


_seen = Remembered()
_references: dict[str, Any] = {}
"""What the worker of this process has been given with its last task."""


class _Worker:
    """What runs in an actor's process."""

    def __init__(self, threads: int, modules: tuple[str, ...]) -> None:
        self._threads = threads
        import_ahead(modules)

    def is_there(self) -> bool:
        """Return that the actor has begun."""
        return True

    def call(
        self, content: bytes, arrays: list[Any], references: list[Any]
    ) -> tuple[bytes, list[Any]]:
        """Return what came of a function and its argument; see `answer`."""
        _references.clear()
        _references.update((reference.hex(), reference) for reference in references)
        return answer(partial(loads_apart, content, arrays), self._threads, dumps_apart)


class _Actors:
    """Workers that are actors; one that ends is started anew, wherever there is room."""

    patience = FIRST_PATIENCE

    def __init__(self, ray: ModuleType, workers: Workers) -> None:
        self._ray, self._workers = ray, workers
        on_cards = workers.device.startswith("cuda")
        there = ray.cluster_resources().get("GPU" if on_cards else "CPU", 0)
        each = 1 if on_cards else workers.threads
        most = int(there) // each
        self.count = min(workers.count or most, most)
        if not most:
            what = "cards" if on_cards else "cores"
            raise EngineError(
                f"A worker takes {each} {what}, and Ray has {there:g}. Give it more, or use "
                "--threads 1."
            )
        self._class = ray.remote(
            num_cpus=1 if on_cards else each,
            num_gpus=1 if on_cards else 0,
            max_restarts=0,
            scheduling_strategy="SPREAD",
        )(_Worker)
        self._actors: list[Any] = [None] * self.count
        self._shared: dict[str, Any] = {}
        self._expected: dict[Any, int] = {}
        """What is being waited for, and the seat that it comes from."""
        self._new: set[Any] = set()
        """Of these, the signs of life of workers that are being started."""
        for seat in range(self.count):
            self._start(seat)
        there, _ = ray.wait(list(self._new), num_returns=self.count, timeout=FIRST_PATIENCE)
        for sign in there:  # so that the first tasks in place find theirs
            self._note(sign)

    def _start(self, seat: int) -> None:
        workers = self._workers
        self._actors[seat] = self._class.remote(workers.threads, workers.modules)
        sign = self._actors[seat].is_there.remote()
        self._expected[sign] = seat
        self._new.add(sign)

    def map(
        self, function: Callable[[Any], Any], tasks: Sequence[Task], *, in_place: bool = False
    ) -> Iterator[Any]:
        try:
            yield from scheduled(
                self, function, tasks, in_place=in_place, tries=self._workers.tries
            )
        finally:
            for reference in [one for one in self._expected if one not in self._new]:
                seat = self._expected.pop(reference)  # nobody waits for it any more
                self._ray.kill(self._actors[seat])
                self._start(seat)

    def taken(self) -> set[int]:
        return set(range(self.count)) - set(self._expected.values())

    def send(self, seat: int, function: Callable[[Any], Any], argument: Sent) -> None:
        content, arrays = dumps_apart((function, argument))
        shared = list(self._shared.values())
        reference = self._actors[seat].call.remote(content, arrays, shared)
        self._expected[reference] = seat

    def listen(self, timeout: float | None, only: int | None = None) -> SeatNews | None:
        asked = [
            reference
            for reference, seat in self._expected.items()
            if only in (None, seat) or reference in self._new
        ]
        ready, _ = self._ray.wait(asked, num_returns=1, timeout=timeout, fetch_local=only is None)
        if not ready:
            return None
        return self._note(ready[0])

    def _note(self, reference: Any) -> SeatNews:  # noqa: ANN401
        """Return what has come."""
        seat, is_new = self._expected.pop(reference), reference in self._new
        self._new.discard(reference)
        try:
            found = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._start(seat)
            return SeatNews(seat, lost=f"with {type(error).__name__}", is_new=is_new)
        return SeatNews(seat, is_new=True) if is_new else SeatNews(seat, *loads_apart(*found))

    @contextmanager
    def share(self, value: Sent) -> Iterator[Shared]:
        reference = self._ray.put(dumps_apart(value))
        number = reference.hex()
        self._shared[number] = reference
        try:
            yield _Stored(number)
        finally:
            del self._shared[number]

    def end(self) -> None:
        """End all of them; a map that an error has left then finds nobody to replace."""
        self._expected.clear()
        for actor in self._actors:
            with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
                self._ray.kill(actor)


ENGINE = WorkEngine(
    summary="Ray: this machine, or with --address all nodes of a cluster; needs the extra `ray`.",
    check=_check,
    open=_open,
)
