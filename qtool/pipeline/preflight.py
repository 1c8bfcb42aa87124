"""What `quantize --dry-run=measure` finds out: a part of the run is done, the rest predicted."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from qtool.base import Emit, Env, Fallback, Progress, ignore_events
from qtool.checkpoint.place import find_place
from qtool.checkpoint.writer import MAX_SHARD_BYTES, CheckpointWriter
from qtool.choosing.choose import check_choices
from qtool.choosing.search.q_rater import check_search
from qtool.core.parts import Parts
from qtool.errors import BackendError
from qtool.evaluation.closeness import compare_closely
from qtool.modeling.device import default_device, free_memory
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source
from qtool.pipeline.check import AS_USUAL, record_original
from qtool.pipeline.quantize import open_samples
from qtool.recipe.measuring import CheckSection
from qtool.recipe.schema import Recipe
from qtool.steps import measure_blocks as blocks
from qtool.steps.measure_rest import (
    COPY,
    FIRST_STEP,
    LOAD,
    LOOK,
    STEP,
    STEPS_TAKEN,
    end_to_end_costs,
    measure_copying,
    measure_end_to_end,
    time_tables,
)
from qtool.steps.memory import failures_of_the_machine
from qtool.steps.plan import Plan, make_plan
from qtool.steps.preflight import BlockCosts, Phase, Preflight, solving, stretched
from qtool.steps.run import Run
from qtool.steps.solve import block_of
from qtool.steps.usage import NO_USE, Meter, machine_room

OPEN, DRAW, READ, CHECK = "open", "draw calibration", "read files", "check"
COMPARE = "compare"
FOLD, CAPTURE, SOLVE, TUNE = "fold", "capture", "solve blocks", "tune blocks"
WRITE, TUNE_MODEL = "write", "tune end to end"
PHASES = {
    **{name: name for name in (OPEN, DRAW, READ, CHECK)},
    **dict.fromkeys((blocks.FIRST_FOLD, blocks.NEXT_FOLD), FOLD),
    blocks.CAPTURED: CAPTURE,
    **{blocks.tuning_for(steps): TUNE for steps in (blocks.FEW_STEPS, blocks.MORE_STEPS)},
    **dict.fromkeys((LOAD, FIRST_STEP, STEP, LOOK), TUNE_MODEL),
    COPY: WRITE,
    COMPARE: CHECK,
}
"""By what is measured; the rest is `SOLVE`."""
NOT_KNOWN = "not measured: it takes what it takes to"


def preflight(
    model: Location,
    out_dir: Path,
    recipe: Recipe,
    *,
    calib_dir: Path | None = None,
    check: bool = True,
    emit: Emit = ignore_events,
) -> Preflight:
    """Predict what `quantize` would take; arguments and errors as there.

    Samples are drawn as for the run, and one block of each kind is captured, solved and tuned for a
    few steps; nothing is written but to a folder for temporary files.
    """
    section, recipe = recipe.check, recipe.without_measuring()
    meter = Meter(str(default_device()))
    with meter.measuring(OPEN):
        emit(Progress("opening the model"))
        source = open_source(model)
        plan = make_plan(source, recipe)
        check_choices(source, recipe, plan)
        check_search(source, recipe, plan)
    with meter.measuring(DRAW):
        samples = open_samples(source, recipe, calib_dir, emit)
    parts = Parts(lambda message: emit(Fallback(message)))
    env = Env(device=str(default_device()), seed=recipe.seed, emit=emit, parts=parts)
    run = Run(source, recipe, plan, samples, env, samples_given=calib_dir is not None)
    with _naming(meter), failures_of_the_machine(env.device, out_dir):
        found = _measured(run, meter)
        wanted = check and (samples is not None or section is not None)
        if wanted:
            found = replace(found, unchecked=_measure_check(run, meter, section or AS_USUAL))
    phases = tuple(_phases(found, checked=wanted))
    return Preflight(phases, machine_room(env.device, out_dir))


@contextmanager
def _naming(meter: Meter) -> Iterator[None]:
    """Say of an error of the machine in which phase it came."""
    try:
        yield
    except BackendError as error:
        phase = PHASES.get(meter.last, SOLVE)
        raise BackendError(f"'{phase}' won't fit: {error}") from error


@dataclass(frozen=True, slots=True)
class _Found:
    """What was measured."""

    run: Run
    meter: Meter
    copied: int
    """Bytes of the tensor that was copied."""
    tables: dict[str, float] = field(default_factory=dict)
    unchecked: str | None = None
    """Why the result won't be checked."""


def _measured(run: Run, meter: Meter) -> _Found:
    """Carry out a part of the run."""
    with tempfile.TemporaryDirectory(prefix="qtool-preflight-") as folder:
        with meter.measuring(READ):
            run.env.emit(Progress("reading the model's files"))
            writer = CheckpointWriter(find_place(Path(folder, "result")), run.fingerprint())
        with writer:
            blocks.measure_fold(run, meter)
            solved = blocks.measure_blocks(run, writer, meter)
            measure_end_to_end(run, writer, solved, meter)
            free_memory()
            tables = time_tables(run, meter)
            return _Found(run, meter, measure_copying(run, writer, meter), tables)


def _measure_check(run: Run, meter: Meter, section: CheckSection) -> str | None:
    """Check the original in place of the result, or return why that can't be done."""
    source, emit = run.source, run.env.emit
    free_memory()
    try:
        with meter.measuring(CHECK):
            references = record_original(source, default_device(), emit, section)
        with meter.measuring(COMPARE):
            model = load_model(Location(source.directory, source.public_name))
            compare_closely(model, references, emit)
    except BackendError as error:
        return f"left out: {error}"
    finally:
        free_memory()
    return None


def _phases(found: _Found, *, checked: bool) -> Iterator[Phase]:
    """Yield all phases, in their order."""
    run, meter, plan = found.run, found.meter, found.run.plan
    recipe, done = run.recipe, "measured, whole"
    yield Phase(OPEN, meter.mean(OPEN), how=done)
    if run.calibration is not None:
        yield Phase(DRAW, meter.mean(DRAW), how=done)
    yield Phase(READ, meter.mean(READ), how=done)
    if recipe.fold is not None:
        others = meter.mean(blocks.NEXT_FOLD) * (run.source.num_blocks - 1)
        how = f"2 of {run.source.num_blocks} blocks measured"
        yield Phase(FOLD, meter.mean(blocks.FIRST_FOLD) + others, how=how)
    if recipe.choosing is not None:
        yield Phase("choose bits", None, how=f"{NOT_KNOWN} choose; --dry-run does it, and keeps it")
    if recipe.search is not None:
        yield Phase("search", None, how=f"{NOT_KNOWN} try every layer")
    if run.calibration is not None:
        yield Phase(CAPTURE, meter.mean(blocks.CAPTURED), how=done)
    yield from _block_phases(found)
    yield from _table_phases(found)
    if recipe.tuning.end_to_end is not None and run.calibration is not None:
        how = f"{STEPS_TAKEN} of {recipe.tuning.end_to_end.steps} steps measured"
        yield Phase(TUNE_MODEL, end_to_end_costs(run, meter), how=how)
    yield _writing(found)
    if checked:
        yield _checking(found, plan)


def _block_phases(found: _Found) -> Iterator[Phase]:
    run, meter = found.run, found.meter
    planned = blocks.planned_blocks(run.source, run.plan)
    kinds = [[blocks.kind_of(run.source, layer) for layer in block] for block in planned]
    weights = {
        blocks.kind_of(run.source, layer): prod(layer.shape) for block in planned for layer in block
    }
    costs = BlockCosts(
        layers={kind: meter.mean(kind) for kind in weights if kind in meter.names()},
        weights=weights,
        advance=meter.mean(blocks.ADVANCE),
        after=meter.mean(blocks.BIASES),
    )
    section, tuned = run.recipe.tuning.blocks, NO_USE
    if section is not None and run.calibration is not None:
        steps = (blocks.FEW_STEPS, blocks.MORE_STEPS)
        few, more = (meter.mean(blocks.tuning_for(count)) for count in steps)
        tuned = stretched(few, more, steps=steps, wanted=section.steps)
    solved, tuning = solving(costs, kinds, passed=_passed(run), tuned=tuned)
    measured = len(blocks.stand_ins(run.source, run.plan))
    spooled = sum(layer.num_bytes for layer in run.plan.in_blocks)
    drafts = 1 + run.recipe.tuning.is_on
    how = f"{measured} of {len(planned)} blocks measured"
    yield Phase(SOLVE, solved, spooled * drafts + run.stream_bytes(), how)
    if section is not None and run.calibration is not None:
        disk = spooled * (drafts + 1) + run.stream_bytes()
        how = f"{blocks.MORE_STEPS} of {section.steps} steps measured"
        yield Phase(TUNE, tuning, disk, how)


def _passed(run: Run) -> int:
    """Return how many blocks the walk leaves behind: those before the last that has layers."""
    if run.calibration is None:
        return 0
    last = blocks.planned_blocks(run.source, run.plan)[-1][0]
    return int(block_of(run.source, last).rpartition(".")[2])


def _table_phases(found: _Found) -> Iterator[Phase]:
    if not found.tables:
        return
    total, source = NO_USE, found.run.source
    for layer in found.run.plan.layers:
        times = found.tables.get(blocks.kind_of(source, layer))
        if times is not None:
            total = total + found.meter.mean(blocks.kind_of(source, layer)) * times
    part = 1 / max(found.tables.values())
    how = "measured, whole" if part == 1 else f"{part:.0%} of the rows measured"
    yield Phase("solve tables", total, how=how)


def _writing(found: _Found) -> Phase:
    """Copying what isn't quantized, then all once more, from the layers' files to the shards'."""
    plan, recipe = found.run.plan, found.run.recipe
    share = (plan.kept_bytes + plan.total_bytes) / max(found.copied, 1)
    drafts = recipe.tuning.is_on + (recipe.tuning.blocks is not None)
    quantized = plan.total_bytes - plan.kept_bytes
    disk = plan.total_bytes + min(plan.total_bytes, MAX_SHARD_BYTES) + drafts * quantized
    usage = found.meter.mean(COPY) * share
    return Phase(WRITE, usage, disk, f"{found.copied / 1e6:.0f} MB measured")


def _checking(found: _Found, plan: Plan) -> Phase:
    """The result, run after the original, has its packed layers beside dense ones."""
    if found.unchecked is not None:
        return Phase(CHECK, NO_USE, how=found.unchecked)
    usage = found.meter.mean(CHECK) + found.meter.mean(COMPARE)
    packed = plan.total_bytes - plan.kept_bytes
    usage = replace(usage, memory_bytes=usage.memory_bytes + packed)
    return Phase(CHECK, usage, plan.total_bytes, how="the original measured, twice")
