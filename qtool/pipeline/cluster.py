"""`run --dry-run=cluster`: blocks are measured here, and the run is carried out on paper."""

import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from qtool.base import Emit, Env, Progress, ignore_events
from qtool.checkpoint.place import find_place
from qtool.checkpoint.writer import CheckpointWriter
from qtool.core.experts import expert_name
from qtool.core.threads import num_threads
from qtool.engines import EngineOptions, Workers
from qtool.errors import RecipeError
from qtool.modeling.device import default_device
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source
from qtool.pipeline.engine import divided_for
from qtool.pipeline.preflight import DRAW, OPEN
from qtool.pipeline.quantize import open_samples
from qtool.recipe.schema import Recipe
from qtool.steps import measure_blocks as blocks
from qtool.steps.cluster import BlockWork, Cluster, ClusterWork, Forecast, InputGroup, forecast
from qtool.steps.measure_rest import COPY, measure_copying, time_tables
from qtool.steps.memory import failures_of_the_machine
from qtool.steps.plan import LayerPlan, Plan, make_plan, original_bytes
from qtool.steps.row_edges import row_parts
from qtool.steps.run import Run
from qtool.steps.shared_walk import plain_walk
from qtool.steps.solve_apart import check_shareable
from qtool.steps.usage import Meter, machine_room, resident
from qtool.walk.blocks import walk_dtype

TRIED_FLOATS = 2**24
"""Are copied and added, to know how fast that is."""
COPIES = 4
"""From a tensor to bytes, into a pipe, out of it, and to a tensor."""


def cluster_like_this(
    nodes: int, workers: int | None, threads: int, *, memory_bytes: int | None, network: float
) -> Cluster:
    """Return a cluster of nodes like this machine.

    Args:
        nodes: How many.
        workers: On all of them; None: one per card, or as many as cores have threads.
        threads: Of each worker on a CPU.
        memory_bytes: Of each node; None: as here.
        network: Bytes per second in or out of one.
    """
    device = str(default_device())
    room, on_card = machine_room(device, Path()), device.startswith("cuda")
    here = max(1, len(os.sched_getaffinity(0)) // threads)
    here = torch.cuda.device_count() if on_card else here
    return Cluster(
        nodes=nodes,
        workers=workers or nodes * here,
        memory_bytes=room.memory_bytes if memory_bytes is None else memory_bytes,
        card_bytes=room.card_bytes,
        network=network,
    )


def foresee(
    model: Location,
    recipe: Recipe,
    cluster: Cluster,
    *,
    threads: int = 1,
    calib_dir: Path | None = None,
    emit: Emit = ignore_events,
) -> Forecast:
    """Predict what a recipe would take on a cluster whose workers are like this machine.

    One block of each kind is measured and solved, as `preflight` does; nothing is kept.

    Args:
        model: The original.
        recipe: How it is quantized.
        cluster: What there would be.
        threads: Of each worker on a CPU.
        calib_dir: Samples that `calibrate` drew.
        emit: Is told of each step.

    Raises:
        RecipeError: something that the recipe asks for can't be shared, or foreseen.
        QtoolError: as `quantize`.
    """
    device, recipe = str(default_device()), recipe.without_measuring()
    recipe = divided_for(recipe, EngineOptions("ray", Workers()), device)
    base, meter = resident(), Meter(device)
    with meter.measuring(OPEN):
        source = open_source(model)
        plan = make_plan(source, recipe)
    check_shareable(recipe)
    _check_foreseeable(recipe, plan)
    with meter.measuring(DRAW):
        samples = open_samples(source, recipe, calib_dir, emit)
    env = Env(device=device, seed=recipe.seed, emit=emit)
    run = Run(source, recipe, plan, samples, env, samples_given=calib_dir is not None)
    with num_threads(threads), failures_of_the_machine(device, Path()):
        return forecast(_measured(run, meter, base), cluster)


def _check_foreseeable(recipe: Recipe, plan: Plan) -> None:
    if recipe.calibration is not None and any(expert_name(each.name) for each in plan.in_blocks):
        raise RecipeError(
            "--dry-run=cluster can't foresee samples of a model with experts: which tokens go to "
            "which is known only when they are run. Leave out calibration, or --dry-run=cluster."
        )


def _measured(run: Run, meter: Meter, base: int) -> ClusterWork:
    """Carry out a part of the run."""
    with tempfile.TemporaryDirectory(prefix="qtool-cluster-") as folder:
        place = find_place(Path(folder, "result"))
        with CheckpointWriter(place, run.fingerprint()) as writer:
            solved = blocks.measure_blocks(run, writer, meter)
            run.env.emit(Progress("measuring the rest"))
            times = time_tables(run, meter)
            copied = measure_copying(run, writer, meter)
    layers = {kind: _Layer.of(meter, kind, result.seconds) for kind, result in solved.items()}
    plan, section = run.plan, run.recipe.calibration
    share = (plan.kept_bytes + plan.total_bytes) / max(copied, 1)
    tables = [
        meter.mean(kind).seconds * times[kind]
        for kind in (blocks.kind_of(run.source, each) for each in plan.layers)
        if kind in times
    ]
    begun = (OPEN, DRAW, blocks.CAPTURED)
    calibrated = run.calibration is not None and section is not None
    copying, adding = _rates()
    return ClusterWork(
        blocks=_blocks(run, layers, meter.mean(blocks.ADVANCE).seconds),
        tables=tuple(tables),
        before=sum(meter.mean(name).seconds for name in begun),
        after=meter.mean(COPY).seconds * share,
        chunks=(section.chunks or 1) if calibrated and section is not None else 0,
        prefix="linears" if section is None else section.prefix,
        streams_bytes=_streams(run),
        base_bytes=base,
        copying=copying,
        adding=adding,
    )


@dataclass(frozen=True, slots=True)
class _Layer:
    """What was measured of a linear."""

    measuring: float
    """Seconds, if it is the first with its input."""
    solving: float

    @staticmethod
    def of(meter: Meter, kind: str, solving: float) -> "_Layer":
        return _Layer(max(meter.mean(kind).seconds - solving, 0.0), solving)


def _blocks(run: Run, measured: dict[str, _Layer], advance: float) -> tuple[BlockWork, ...]:
    """Return what blocks take, those together that are alike."""
    source, section = run.source, run.recipe.calibration
    planned = blocks.planned_blocks(source, run.plan)
    kinds = [tuple(blocks.kind_of(source, layer) for layer in block) for block in planned]
    examples = dict(zip(kinds, planned, strict=True))
    dtype = torch.float32
    if section is not None:
        dtype = walk_dtype(source, run.env.device, section.dtype)
    found = []
    for kind, count in Counter(kinds).items():
        layers = examples[kind]
        weights = sum(prod(layer.shape) for layer in layers)
        found.append(
            BlockWork(
                count=count,
                stored_bytes=sum(
                    original_bytes(source, f"{layer.name}.weight") for layer in layers
                ),
                walked_bytes=2 * weights * dtype.itemsize,
                advance=advance,
                groups=_groups(run, layers, measured),
            )
        )
    return tuple(found)


def _groups(
    run: Run, layers: Sequence[LayerPlan], measured: dict[str, _Layer]
) -> tuple[InputGroup, ...]:
    """Return the linears of a block, those together that share an input."""
    source, section = run.source, run.recipe.calibration
    among: dict[str, list[LayerPlan]] = {layer.name: [layer] for layer in layers}
    walked = run.calibration is not None and section is not None
    if walked:
        walk, among = plain_walk(run, Path()), {}
        for layer in layers:
            among.setdefault(walk.group(layer.name)[1], []).append(layer)
    found = []
    for name, sharing in among.items():
        into = source.residual if section is not None and section.residual_error else None
        width = sharing[0].shape.out_features if into is not None and name in into else 0
        first = _priced(run, measured, sharing[0])
        parts = [
            (part, _priced(run, measured, layer).solving * part / layer.shape.out_features)
            for layer in sharing
            for part in _parts(run, layer)
        ]
        group = InputGroup(
            name=name,
            in_features=sharing[0].shape.in_features,
            residual=width,
            measuring=first.measuring,
            parts=tuple(parts),
        )
        found.append(group)
    return tuple(found)


def _parts(run: Run, layer: LayerPlan) -> list[int]:
    """Return the rows of each part that a linear is solved in."""
    section = run.recipe.calibration
    if section is None or run.calibration is None:
        return [layer.shape.out_features]
    return [part.stop - part.start for part in row_parts(layer, section.part_rows)]


def _priced(run: Run, measured: dict[str, _Layer], layer: LayerPlan) -> _Layer:
    """Return what a linear takes; one that wasn't measured as long as others per weight."""
    kind = blocks.kind_of(run.source, layer)
    if kind in measured:
        return measured[kind]
    same = {blocks.kind_of(run.source, each): prod(each.shape) for each in run.plan.in_blocks}
    weights = max(sum(same[kind] for kind in measured if kind in same), 1)
    share = prod(layer.shape) / weights
    return _Layer(
        sum(each.measuring for each in measured.values()) * share,
        sum(each.solving for each in measured.values()) * share,
    )


def _streams(run: Run) -> int:
    """Return what the blocks' inputs take, of both models, as they are walked."""
    section = run.recipe.calibration
    if run.calibration is None or section is None:
        return 0
    width = run.source.weight_shape(run.source.adapter.embedding).in_features
    dtype = walk_dtype(run.source, run.env.device, section.dtype)
    models = 1 if section.prefix == "original" else 2
    return models * run.calibration.num_tokens * width * dtype.itemsize


def _rates() -> tuple[float, float]:
    """Return how fast tensors go from process to process, and are added up, in bytes a second."""
    values, total = torch.ones(TRIED_FLOATS), torch.zeros(TRIED_FLOATS, dtype=torch.float64)
    size = values.numel() * values.element_size()
    begun = time.perf_counter()
    for _ in range(COPIES):
        values.clone()
    copied = time.perf_counter()
    total += values
    added = time.perf_counter()
    return size / max(copied - begun, 1e-9), size / max(added - copied, 1e-9)
