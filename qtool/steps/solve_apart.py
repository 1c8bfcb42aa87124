"""Layers that don't wait for one another are solved on workers: a map over layers."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby, islice

from torch import Tensor

from qtool.base import Notice, Progress
from qtool.checkpoint.spool import Made
from qtool.checkpoint.writer import CheckpointWriter
from qtool.core.experts import expert_name
from qtool.engines import Shared, Task
from qtool.errors import RecipeError
from qtool.recipe.schema import Recipe
from qtool.steps.activation_ranges import has_static_inputs
from qtool.steps.plan import LayerPlan
from qtool.steps.row_edges import row_parts
from qtool.steps.run import Run
from qtool.steps.shared_walk import SharedWalk
from qtool.steps.solve_calibrated import SolvedPart
from qtool.steps.solve_experts import experts_apart
from qtool.steps.solve_layer import joined_for, part_for, solved_for
from qtool.steps.table_statistics import hessian_of
from qtool.walk.statistics import InputStatistics
from qtool.walk.walk import Walk


def check_shareable(recipe: Recipe) -> None:
    """Refuse what one process has to do alone.

    Raises:
        RecipeError: the recipe tunes, corrects biases, weighs tokens, or has static inputs.
    """
    section = recipe.calibration
    alone = {
        "tuning": recipe.tuning.is_on,
        "activations.granularity: tensor": has_static_inputs(recipe),
        "calibration.bias_correction": section is not None and section.bias_correction,
        "calibration.output_groups": section is not None and section.output_groups is not None,
    }
    found = [key for key, is_asked in alone.items() if is_asked]
    if found:
        raise RecipeError(
            f"{' and '.join(found)} can't be shared among workers yet. Leave out --engine, or that."
        )


def together(run: Run, walk: Walk | None) -> Iterator[tuple[LayerPlan, ...]]:
    """Yield layers that can be solved at the same time, in the order of the plan.

    Those of the blocks see what is quantized before them, as `calibration.prefix` says.
    """
    section = run.recipe.calibration
    if walk is None or section is None:
        yield run.plan.layers
        return
    in_blocks = list(run.plan.in_blocks)

    def alike(layer: LayerPlan) -> tuple[int | str, ...]:
        block, linear = walk.group(layer.name)
        if expert_name(layer.name) is not None:
            return block, "experts"
        return (block, linear) if section.prefix == "linears" else (block,)

    for _, layers in groupby(in_blocks, alike):
        yield tuple(layers)
    yield tuple(layer for layer in run.plan.layers if layer.role != "block")


@dataclass(frozen=True, slots=True)
class Solving:
    """A layer to solve, or a part of its rows: the argument of `solve_one`."""

    run: Shared
    layer: LayerPlan
    rows: slice | None
    """None: all."""
    statistics: Shared | None
    """Of its inputs; None: there are none."""
    under: Shared | None
    """The Hessian of a table; None: there is none."""


Solved = Made | tuple[SolvedPart, float]
"""A whole layer, or a part with the seconds that it took."""


def solve_one(asked: Solving) -> tuple[Solved, list[Progress | Notice]]:
    """Return what a layer or a part of it becomes, and what is to be told of it."""
    run: Run = asked.run.get()
    told: list[Progress | Notice] = []
    device = run.env.device
    run = replace(run, env=replace(run.env, emit=told.append))
    statistics: tuple[InputStatistics, ...] | None = None
    if asked.statistics is not None:
        statistics = asked.statistics.get()
        if device != "cpu":
            statistics = tuple(each.on(device) for each in statistics)
    if asked.rows is not None:
        assert statistics is not None
        return part_for(run, asked.layer, asked.rows, statistics), told
    under: Tensor | None = None if asked.under is None else asked.under.get().to(device)
    return solved_for(run, asked.layer, statistics, lambda _layer: under), told


def made_apart(
    run: Run,
    writer: CheckpointWriter,
    walk: SharedWalk | None,
    shared: Shared,
    layers: Sequence[LayerPlan],
    names: Sequence[str],
) -> Iterator[Made]:
    """Yield what some of the layers become, in their order, solved by the workers of a run."""
    pool = run.pool
    assert pool is not None
    if walk is not None and expert_name(layers[0].name) is not None:
        yield from experts_apart(run, walk, shared, layers, names)
        return
    with ExitStack() as stack:
        seen: dict[int, Shared] = {}  # linears that share an input have one object

        def share(value: object) -> Shared | None:
            if value is not None and id(value) not in seen:
                seen[id(value)] = stack.enter_context(pool.share(value))
            return seen.get(id(value))

        tasks, kept = list[Task](), []
        for layer in (layer for layer in layers if layer.name in names):
            of_block = walk is not None and layer.role == "block"
            statistics = walk.statistics(layer.name) if walk is not None and of_block else None
            under = None if layer.role == "block" else hessian_of(run, writer, layer)
            own = _tasks(run, shared, layer, share(statistics), share(under))
            tasks += own
            kept.append((layer, len(own), statistics, under))  # nothing else gets their numbers
        found = pool.map(solve_one, tasks)
        for layer, count, statistics, _ in kept:
            parts = []
            for part, told in islice(found, count):
                parts.append(part)
                for event in told:
                    run.env.emit(event)
            yield _whole(run, layer, parts, statistics)


def _tasks(
    run: Run, shared: Shared, layer: LayerPlan, statistics: Shared | None, under: Shared | None
) -> list[Task]:
    """Return the tasks that solve a layer."""
    section = run.recipe.calibration
    parts: list[slice] = []
    if section is not None and statistics is not None:
        parts = row_parts(layer, section.part_rows)
    rows, columns = layer.shape
    if len(parts) <= 1:
        asked = Solving(shared, layer, None, statistics, under)
        return [Task(layer.name, asked, cost=float(rows) * columns * columns)]
    return [
        Task(
            f"rows {part.start} to {part.stop} of {layer.name}",
            Solving(shared, layer, part, statistics, under),
            cost=float(part.stop - part.start) * columns * columns,
        )
        for part in parts
    ]


def _whole(
    run: Run,
    layer: LayerPlan,
    parts: Sequence[Solved],
    statistics: Sequence[InputStatistics] | None,
) -> Made:
    """Return a layer of its parts."""
    if isinstance(parts[0], Made):
        return parts[0]
    assert statistics is not None
    found = [part for part in parts if not isinstance(part, Made)]
    return joined_for(run, layer, found, statistics[0].activation)
