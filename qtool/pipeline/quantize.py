"""Quantizing, from a request to what is on disk."""

import os
import time
from dataclasses import replace
from pathlib import Path

from qtool.base import Emit, Env, Notice, Progress, ignore_events
from qtool.checkpoint.apart import check_apart
from qtool.checkpoint.claim import look
from qtool.checkpoint.place import Place, check_free_space, find_place
from qtool.checkpoint.writer import MAX_SHARD_BYTES, CheckpointWriter
from qtool.choosing.choose import Allocation, check_choices, choose
from qtool.choosing.choose_rows import choose_rows
from qtool.choosing.search.q_rater import check_search, search_layers
from qtool.data.calibration import CalibrationSet
from qtool.data.calibration_files import load_calibration
from qtool.engines import EngineOptions
from qtool.modeling.device import default_device
from qtool.modeling.load import load_tokenizer
from qtool.modeling.locate import Location
from qtool.modeling.source import ModelSource, open_source
from qtool.pipeline.check import check_result
from qtool.pipeline.check_budgets import check_budgets
from qtool.pipeline.engine import check_engine, divided_for, with_workers
from qtool.pipeline.reports import Decisions, QuantizeResult, RunCourse, result_of, write_result
from qtool.recipe.measuring import CheckSection
from qtool.recipe.schema import Recipe
from qtool.steps.check_exportable import check_exportable
from qtool.steps.draw_calibration import check_samples, draw_calibration, wanted_lengths
from qtool.steps.fallbacks import keeping_sentences
from qtool.steps.fold import fold
from qtool.steps.memory import failures_of_the_machine
from qtool.steps.plan import Plan, make_plan
from qtool.steps.request import shadowed_overrides
from qtool.steps.run import Run
from qtool.steps.solve import settle, solve

FEW_BITS = 3
"""Up to this width, quantization without data is warned of."""
NO_LOCKS = (
    "The disk of OUT_DIR has no locks, so nothing keeps a second run from writing there as well."
)


def plan(model: Location, recipe: Recipe, *, target: str | None = None) -> Plan:
    """Return what `quantize` would do, with bits and bytes per layer; reads no weights."""
    source = open_source(model)
    found = make_plan(source, recipe)
    if target is not None:
        check_exportable(source, found, target)
    return found


def explain(
    model: Location,
    recipe: Recipe,
    *,
    calib_dir: Path | None = None,
    emit: Emit = ignore_events,
) -> Allocation | None:
    """Return what `quantize` would choose, and why; None: the recipe leaves nothing open.

    Loads the model to measure prices, which are kept for `quantize`; arguments and errors as there.
    """
    emit(Progress("opening the model"))
    source = open_source(model)
    layer_plan = make_plan(source, recipe)
    check_choices(source, recipe, layer_plan)
    if recipe.choosing is None:
        return None
    samples = open_samples(source, recipe, calib_dir, emit)
    env = Env(device=str(default_device()), seed=recipe.seed, emit=emit)
    return choose(choose_rows(fold(Run(source, recipe, layer_plan, samples, env))))


def quantize(  # noqa: PLR0913 - what, where to, how, and six switches
    model: Location,
    out_dir: Path,
    recipe: Recipe,
    *,
    calib_dir: Path | None = None,
    samples: CalibrationSet | None = None,
    overwrite: bool = False,
    resume: bool = False,
    check: bool = False,
    target: str | None = None,
    engine: EngineOptions | None = None,
    emit: Emit = ignore_events,
) -> QuantizeResult:
    """Quantize a model and write a checkpoint.

    Args:
        model: Where the original is, or comes from.
        out_dir: Where the checkpoint goes; appears only when it is complete.
        recipe: All that decides the result.
        calib_dir: Samples that `calibrate` drew; None: draw them as the recipe says.
        samples: The same, read or drawn already.
        overwrite: Replace a checkpoint that is there, and drop an unfinished run.
        resume: Continue an unfinished run of the same recipe.
        check: If there are samples, or the recipe has a section `check`, compare the result with
            the original at the end: it is loaded whole, as far as memory allows.
        target: Format of another program that the result must be expressible in; None: any.
        engine: Workers that share the work; None: this process does it.
        emit: Is told of each layer and of what comes between, and warned.

    Raises:
        QtoolError: see `qtool.errors`; finished layers are kept for `resume`, and what is at
            `out_dir` stays as it was.
    """
    course = RunCourse(time.perf_counter(), emit)
    emit = course.hear
    budgets, recipe = recipe.check, recipe.without_measuring()
    recipe = divided_for(recipe, engine, str(default_device()))
    place = find_place(out_dir, overwrite=overwrite, resume=resume)
    if model.path is not None:
        check_apart(place.out_dir, model.path)  # before anything is said of --overwrite
    look(place)
    check_engine(engine, recipe)
    emit(Progress("opening the model"))
    source = open_source(model)
    check_apart(place.out_dir, source.directory, _inputs(recipe, calib_dir))
    layer_plan = _planned(source, recipe, target)
    _check_room(place, layer_plan)
    _warn(source, layer_plan, recipe, emit)
    samples = samples or open_samples(source, recipe, calib_dir, emit)
    env = Env(device=str(default_device()), seed=recipe.seed, emit=emit)
    run = Run(source, recipe, layer_plan, samples, env, samples_given=calib_dir is not None)
    _check_room(place, layer_plan, run.stream_bytes())
    with failures_of_the_machine(env.device, place.out_dir), with_workers(run, engine) as run:
        result = _carry_out(run, place, course)
    if not check or (samples is None and budgets is None):
        return result
    with failures_of_the_machine(env.device, place.out_dir):
        return _compared(result, source, place, budgets, emit)


def _compared(
    result: QuantizeResult,
    source: ModelSource,
    place: Place,
    budgets: CheckSection | None,
    emit: Emit,
) -> QuantizeResult:
    """Return the result with how close it is to the original."""
    if budgets is None:
        return replace(result, check=check_result(source, place.named, emit))
    found, lines = check_budgets(source, place.named, budgets, emit)
    return replace(result, check=found, budgets=lines)


def _planned(source: ModelSource, recipe: Recipe, target: str | None) -> Plan:
    """Return a plan of which all that it leaves open, and what becomes of it, is checked."""
    found = make_plan(source, recipe)
    check_choices(source, recipe, found)
    check_search(source, recipe, found)
    if target is not None:
        check_exportable(source, found, target)
    return found


def _carry_out(run: Run, place: Place, course: RunCourse) -> QuantizeResult:
    """Solve and write, or take what an earlier run has left."""
    run.env.emit(Progress("reading the model's files"))
    writer = CheckpointWriter(place, run.fingerprint())
    with writer, failures_of_the_machine(run.env.device, place.out_dir):
        if not writer.is_locked:
            run.env.emit(Notice(NO_LOCKS))
        if writer.is_sealed:
            writer.publish()
        if writer.is_sealed or writer.has_ended:
            return result_of(place)
        run, decisions = _decide(keeping_sentences(run, writer), writer)
        _check_room(place, run.plan)
        solved = solve(run, writer)
        curves = settle(run, writer, solved)
        run.env.emit(Progress("assembling the result"))
        return write_result(run, solved, curves, writer, course, decisions)


def _decide(run: Run, writer: CheckpointWriter) -> tuple[Run, Decisions]:
    """Decide all that the recipe leaves open."""
    run = choose_rows(fold(run, writer), writer)
    allocation = choose(run, writer)
    if allocation is not None:
        run = replace(run, plan=allocation.plan)
    found = search_layers(run, writer)
    if found is not None:
        run = replace(run, plan=found.plan)
    return run, Decisions(allocation, found)


def _inputs(recipe: Recipe, calib_dir: Path | None) -> list[Path]:
    """Return what a run reads beside the model."""
    sources = recipe.calibration.sources if recipe.calibration else ()
    files = [path for source in sources if (path := Path(source.dataset)).suffix]
    return [path for path in (calib_dir, *files) if path is not None and os.path.exists(path)]  # noqa: PTH110


def _check_room(place: Place, layer_plan: Plan, streams: int = 0) -> None:
    """Check the disk; the inputs of the blocks are gone before shards are assembled."""
    shard = min(layer_plan.total_bytes, MAX_SHARD_BYTES)
    check_free_space(place, layer_plan.total_bytes, besides=max(shard, streams))


def _warn(source: ModelSource, layer_plan: Plan, recipe: Recipe, emit: Emit) -> None:
    """Say which overrides do nothing, and that few bits without data ruin a model (docs/log.md)."""
    for message in shadowed_overrides(recipe, [*source.block_linears()]):
        emit(Notice(message))
    fewest = min(layer.scheme.num_bits for layer in layer_plan.layers)
    if recipe.calibration is None and fewest <= FEW_BITS:
        message = (
            f"{fewest} bits without calibration data usually ruin a model. Leave out "
            "--no-calibration, or give the recipe a section 'calibration'."
        )
        emit(Notice(message))


def open_samples(
    source: ModelSource, recipe: Recipe, directory: Path | None, emit: Emit
) -> CalibrationSet | None:
    """Read the samples, or draw those that the recipe asks for; None: no data."""
    section = recipe.calibration
    if section is None:
        return None
    emit(Progress("drawing calibration data"))
    tokenizer = load_tokenizer(source.directory)
    if directory is not None:
        calibration = load_calibration(directory, tokenizer)
        check_samples(source, tokenizer, calibration, emit)
        return calibration
    lengths = wanted_lengths(section, tokenizer, None)
    return draw_calibration(
        section, source, tokenizer, lengths=lengths, seed=recipe.seed, emit=emit
    )
