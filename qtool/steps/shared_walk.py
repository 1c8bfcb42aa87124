"""The walk with many workers: each takes its chunks of the samples through the blocks.

A worker has a walk of its own, which catches up with the layers that are solved by then, as that of
a run that was stopped does. So one that takes another's place needs nothing but what is stored.
"""

import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from qtool.base import ignore_events
from qtool.core.moments import Moments
from qtool.engines import Pool, Shared, Task
from qtool.errors import MethodError
from qtool.scheme import ActivationScheme
from qtool.steps.activation_ranges import input_scheme
from qtool.steps.run import Run
from qtool.walk.blocks import walk_dtype
from qtool.walk.shares import ALL_SAMPLES, Share
from qtool.walk.solved import InputRules, SolvedLinear
from qtool.walk.statistics import InputStatistics, RowGroups, why_not_finite
from qtool.walk.sums import SumPlace, Totals
from qtool.walk.walk import Walk


def plain_walk(
    run: Run,
    directory: Path,
    share: Share = ALL_SAMPLES,
    weigh: Callable[[], Mapping[str, RowGroups]] | None = None,
) -> Walk:
    """Return a walk of one process for a share of the samples.

    Args:
        run: With samples.
        directory: For the blocks' inputs, if the recipe says so.
        share: The chunks that it is for.
        weigh: See `InputRules`.
    """
    section, samples = run.recipe.calibration, run.calibration
    assert section is not None
    assert samples is not None
    planned = {layer.name: layer.activation for layer in run.plan.layers}
    rules = InputRules(weigh, partial(input_scheme, run.recipe.activations, planned), share)
    layers = {layer.name: layer.shape for layer in run.plan.layers}
    env = replace(run.env, work_dir=directory)
    return Walk(run.source, layers, samples, section, env, rules)


@dataclass(frozen=True, slots=True)
class WalkPlace:
    """What walks of one run have in common, whichever worker has them."""

    name: str
    """Tells them from those of other runs."""
    directory: Path
    """Of shared storage, for the blocks' inputs if the recipe says so."""


@dataclass(frozen=True, slots=True)
class Measuring:
    """What a worker is to measure: the argument of `measure_chunk`."""

    run: Shared
    walk: WalkPlace
    share: Share
    chunk: int
    """Of the share."""
    layer: str
    solved: Mapping[str, SolvedLinear]
    """All that is, so far."""


Sums = tuple[dict[SumPlace, Moments], ActivationScheme | None]
_walks: dict[tuple[str, Share], tuple[Walk, set[str]]] = {}
"""Of this worker, with the layers that each knows of: what saves it going through all blocks."""


def worker_walk(
    run: Run, place: WalkPlace, share: Share, solved: Mapping[str, SolvedLinear]
) -> tuple[Walk, set[str]]:
    """Return this worker's walk for a share, told of all that is solved, and what it knows of."""
    key = (place.name, share)
    if key not in _walks:
        for other in [known for known in _walks if known[0] != place.name]:
            _walks.pop(other)[0].end()
        own = place.directory / f"{share.number}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        _walks[key] = plain_walk(run, own, share), set()
    walk, known = _walks[key]
    for name, linear in solved.items():
        if name not in known:
            walk.put(name, linear)
            known.add(name)
    return walk, known


def measure_chunk(asked: Measuring) -> Sums:
    """Return the sums of a chunk for what a linear of the blocks sees."""
    walk, _ = worker_walk(asked.run.get(), asked.walk, asked.share, asked.solved)
    return walk.sums(asked.layer, asked.chunk)


class SharedWalk(Walk):
    """A walk whose statistics many workers measure; it runs no block itself."""

    def __init__(self, run: Run, pool: Pool, shared: Shared, directory: Path) -> None:
        """Begin before the first block.

        Args:
            run: With samples, as this process has it.
            pool: The workers.
            shared: The same run as they see it.
            directory: Of shared storage, for the blocks' inputs if the recipe says so.
        """
        section, samples = run.recipe.calibration, run.calibration
        assert section is not None
        assert samples is not None
        layers = {layer.name: layer.shape for layer in run.plan.layers}
        super().__init__(run.source, layers, samples, section, run.env)
        self._run, self._pool, self._shared = run, pool, shared
        self.place = WalkPlace(uuid.uuid4().hex, directory)
        self._done: dict[str, SolvedLinear] = {}
        self._train = samples.split(section.holdout)[0].num_tokens

    def put(self, layer: str, solved: SolvedLinear) -> None:
        """Take a linear that is solved; see `Walk.put`."""
        self._done[layer] = solved

    def seen_by_workers(self) -> dict[str, SolvedLinear]:
        """Return what is solved, by name, if anything that is solved later sees it."""
        return {} if self._section.prefix == "original" else dict(self._done)

    def end(self) -> None:
        """Let go of all that is large."""
        super().end()
        for key in [known for known in _walks if known[0] == self.place.name]:
            _walks.pop(key)[0].end()

    def _measure(self, index: int, linear: str) -> tuple[InputStatistics, ...]:
        if self._measured is None and self._train:
            self.warn_of_few_tokens(self._train)
            self._train = 0  # once
        name = f"{self._run.source.adapter.blocks}.{index}.{linear}"
        solved = self.seen_by_workers()
        chunks, count = self._section.chunks or 1, self._pool.count
        tasks = [
            Task(
                f"chunk {chunk + 1} of {chunks} of the samples, at {name}",
                Measuring(
                    self._shared,
                    self.place,
                    Share(chunk % count, count),
                    chunk,
                    name,
                    solved,
                ),
            )
            for chunk in range(chunks)
        ]
        totals, activation = Totals(), None
        for found, scheme in self._pool.map(measure_chunk, tasks, in_place=True):
            for place in list(found):
                totals.add(place, found.pop(place))
            activation = scheme or activation
        statistics = totals.statistics(None, activation, self._env.device)
        if not all(each.is_finite() for each in statistics):
            dtype = walk_dtype(self._run.source, self._env.device, self._section.dtype)
            raise MethodError(why_not_finite(self._run.source, name, dtype), layer=name)
        return statistics


@contextmanager
def shared_run(run: Run) -> Iterator[Shared | None]:
    """Give a run as other processes can have it, without what belongs to this one.

    None: there are no workers.
    """
    if run.pool is None:
        yield None
        return
    env = replace(run.env, emit=ignore_events, work_dir=None, parts=None)
    with run.pool.share(replace(run, env=env, pool=None)) as shared:
        yield shared
