"""Experts are solved on workers: each expert of a block is a task, which finds its own tokens.

What an expert sees are the tokens routed to it, and those of a chunk say too little: so a worker
takes all samples through the blocks, and only solving is shared. Experts don't wait for one
another; the layers of one see those before them, as `calibration.prefix` says.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from qtool.base import QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.checkpoint.spool import Made
from qtool.core.experts import ExpertName, expert_name
from qtool.engines import Shared, Task
from qtool.scheme import ActivationScheme
from qtool.steps.plan import LayerPlan
from qtool.steps.run import Run
from qtool.steps.shared_walk import SharedWalk, WalkPlace, worker_walk
from qtool.steps.solve_layer import solved_layer
from qtool.walk.shares import ALL_SAMPLES
from qtool.walk.solved import SolvedLinear


@dataclass(frozen=True, slots=True)
class SolvingExpert:
    """The layers of an expert to solve, in order: the argument of `solve_expert_apart`."""

    run: Shared
    walk: WalkPlace
    layers: tuple[LayerPlan, ...]
    solved: Mapping[str, SolvedLinear]
    """All that is, so far."""


def solve_expert_apart(asked: SolvingExpert) -> list[Made]:
    """Return what the layers of an expert become."""
    run: Run = asked.run.get()
    walk, known = worker_walk(run, asked.walk, ALL_SAMPLES, asked.solved)
    found: list[Made] = []
    for layer in asked.layers:
        made = solved_layer(run, layer, walk, lambda _layer: None)
        assert isinstance(made.value, QuantizedTensor)
        inputs = made.notes.get("activation")
        activation = None if inputs is None else ActivationScheme(**inputs)
        weight = partial(codec(made.value.format).dequantize, made.value, torch.float32)
        walk.put(layer.name, SolvedLinear(weight, activation))
        known.add(layer.name)
        found.append(made)
    return found


def experts_apart(
    run: Run, walk: SharedWalk, shared: Shared, layers: Sequence[LayerPlan], names: Sequence[str]
) -> Iterator[Made]:
    """Yield what some layers of experts of a block become, in their order, solved by workers."""
    pool = run.pool
    assert pool is not None
    experts: dict[ExpertName, list[LayerPlan]] = {}
    for layer in (layer for layer in layers if layer.name in names):
        expert = expert_name(layer.name)
        assert expert is not None
        experts.setdefault(expert._replace(weight=""), []).append(layer)
    solved = walk.seen_by_workers()
    tasks = [
        Task(
            f"expert {expert.number} of {expert.module}",
            SolvingExpert(shared, walk.place, tuple(own), solved),
            cost=float(sum(rows * columns * columns for rows, columns in (o.shape for o in own))),
        )
        for expert, own in experts.items()
    ]
    found: dict[str, Made] = {}
    results = zip(experts.values(), pool.map(solve_expert_apart, tasks), strict=True)
    for layer in (layer for layer in layers if layer.name in names):
        while layer.name not in found:
            own, made = next(results)
            found |= {each.name: one for each, one in zip(own, made, strict=True)}
        yield found.pop(layer.name)
