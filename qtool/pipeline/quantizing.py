"""Calibrating and quantizing, from a request to what is on disk."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qtool.base import Emit, Env, ignore_events
from qtool.checkpoint.apart import check_apart
from qtool.checkpoint.claim import look
from qtool.checkpoint.place import Place, check_free_space, find_place
from qtool.checkpoint.writer import MAX_SHARD_BYTES, CheckpointWriter
from qtool.data.calibration import CalibrationSet
from qtool.data.calibration_files import (
    check_no_calibration,
    load_calibration,
    save_calibration,
)
from qtool.modeling.device import default_device
from qtool.modeling.load import load_tokenizer
from qtool.modeling.locate import Location
from qtool.modeling.source import ModelSource, open_source
from qtool.pipeline.reports import QuantizeResult, result_of
from qtool.pipeline.runs import Run, write_result
from qtool.recipe.schema import CalibrationSection, Recipe
from qtool.stages.calibrate import calibrate as draw_calibration
from qtool.stages.calibrate import check_samples, measure_absmax, wanted_lengths
from qtool.stages.calibrated import solve_calibrated
from qtool.stages.memory import failures_in_one_line
from qtool.stages.plan import Plan, make_plan
from qtool.stages.solve import LayerResult, solve_data_free

FEW_BITS = 3
"""Up to this width, quantization without data is warned of."""
NO_LOCKS = (
    "The disk of OUT_DIR has no locks, so nothing keeps a second run from writing there as well."
)


def plan(model: Location, recipe: Recipe) -> Plan:
    """Return what `quantize` would do, with bits and bytes per layer; reads no weights."""
    return make_plan(open_source(model), recipe)


def quantize(  # noqa: PLR0913 - what, where to, how, and three switches
    model: Location,
    out_dir: Path,
    recipe: Recipe,
    *,
    calib_dir: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    emit: Emit = ignore_events,
) -> QuantizeResult:
    """Quantize a model and write a checkpoint.

    Args:
        model: Where the original is, or comes from.
        out_dir: Where the checkpoint goes; appears only when it is complete.
        recipe: All that decides the result.
        calib_dir: Samples that `calibrate` drew; None: draw them as the recipe says.
        overwrite: Replace a checkpoint that is there, and drop an unfinished run.
        resume: Continue an unfinished run of the same recipe.
        emit: Receives `phase`, `layer` and `warning` events.

    Raises:
        QtoolError: see `qtool.errors`; finished layers are kept for `resume`, and what is at
            `out_dir` stays as it was.
    """
    started = time.perf_counter()
    place = find_place(out_dir)
    if model.path is not None:
        check_apart(place.out_dir, model.path)  # before anything is said of --overwrite
    look(place, overwrite=overwrite, resume=resume)
    _phase(emit, "opening the model")
    source = open_source(model)
    check_apart(place.out_dir, source.directory, _inputs(recipe, calib_dir))
    layer_plan = make_plan(source, recipe)
    _check_room(place, layer_plan)
    _warn_of_few_bits(layer_plan, recipe, emit)
    env = Env(device=str(default_device()), seed=recipe.seed, emit=emit)
    run = Run(source, recipe, layer_plan, _calibration(source, recipe, calib_dir, emit), env)
    _check_room(place, layer_plan, run.stream_bytes())
    with failures_in_one_line(env.device, place.out_dir):
        _phase(emit, "reading the model's files")
        flags = Flags(overwrite=overwrite, resume=resume)
        return _run(run, out_dir, place, flags, started)


class Flags(NamedTuple):
    """What may happen to what is there."""

    overwrite: bool
    resume: bool


def _run(run: Run, out_dir: Path, place: Place, flags: Flags, started: float) -> QuantizeResult:
    """Solve and write, or take what an earlier run has left."""
    emit = run.env.emit
    writer = CheckpointWriter(out_dir, fingerprint=run.fingerprint(), **flags._asdict())
    with writer, failures_in_one_line(run.env.device, place.out_dir):
        if not writer.is_locked:
            emit("warning", {"message": NO_LOCKS})
        if writer.is_sealed:
            writer.publish()
        if writer.is_sealed or writer.has_ended:
            return result_of(out_dir, place.out_dir)
        results = _solve(run, writer)
        _phase(emit, "assembling the result")
        return write_result(run, results, writer, out_dir=out_dir, started=started)


def _phase(emit: Emit, name: str) -> None:
    emit("phase", {"name": name})


def _inputs(recipe: Recipe, calib_dir: Path | None) -> list[Path]:
    """Return what a run reads beside the model."""
    dataset = Path(recipe.calibration.dataset) if recipe.calibration else None
    return [path for path in (calib_dir, dataset) if path is not None and os.path.exists(path)]  # noqa: PTH110


def _check_room(place: Place, layer_plan: Plan, streams: int = 0) -> None:
    """Check the disk; the inputs of the blocks are gone before shards are assembled."""
    shard = min(layer_plan.total_bytes, MAX_SHARD_BYTES)
    check_free_space(place, layer_plan.total_bytes, besides=max(shard, streams))


def _warn_of_few_bits(layer_plan: Plan, recipe: Recipe, emit: Emit) -> None:
    """Say that few bits without data ruin a model: docs/log.md has how much."""
    fewest = min(layer.scheme.num_bits for layer in layer_plan.layers)
    if recipe.calibration is None and fewest <= FEW_BITS:
        emit(
            "warning",
            {
                "message": f"{fewest} bits without calibration data usually ruin a model. Leave "
                "out --no-calibration, or give the recipe a section 'calibration'."
            },
        )


def _calibration(
    source: ModelSource, recipe: Recipe, directory: Path | None, emit: Emit
) -> CalibrationSet | None:
    """Read the samples, or draw those that the recipe asks for; None: no data."""
    section = recipe.calibration
    if section is None:
        return None
    _phase(emit, "drawing calibration data")
    tokenizer = load_tokenizer(source.directory)
    if directory is not None:
        calibration = load_calibration(directory, tokenizer)
        check_samples(source, tokenizer, calibration, emit)
        return calibration
    lengths = wanted_lengths(section, tokenizer, None)
    return draw_calibration(
        section, source, tokenizer, lengths=lengths, seed=recipe.seed, emit=emit
    )


@dataclass(frozen=True, slots=True)
class CalibrateResult:
    """What `calibrate` drew."""

    calib_dir: Path
    samples: int
    samples_wanted: int
    """More than `samples` if the text is too short."""
    tokens: int
    digest: str
    wanted_lengths: tuple[int, ...]
    """Lengths that were to be matched; empty if the length is fixed."""
    lengths: tuple[int, ...]


def calibrate(  # noqa: PLR0913 - what to draw from, where to, how
    model: Location,
    calib_dir: Path,
    section: CalibrationSection,
    *,
    lengths: tuple[int, ...] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    emit: Emit = ignore_events,
) -> CalibrateResult:
    """Draw calibration samples, measure the inputs of all linears, write both.

    Args:
        model: As for `quantize`.
        calib_dir: Where samples.safetensors, calibration.json and input_absmax.safetensors go.
        section: What to draw.
        lengths: Lengths to match, instead of the tasks' own.
        seed: Of the order of matched lengths.
        overwrite: Replace calibration data that are there.
        emit: Receives `block` events, and a `warning` if the text is too short.

    Raises:
        OutputError: there are calibration data already, or they can't be written.
    """
    check_no_calibration(calib_dir, overwrite=overwrite)
    source = open_source(model)
    check_no_calibration(calib_dir, overwrite=overwrite, model_directory=source.directory)
    tokenizer = load_tokenizer(source.directory)
    wanted = wanted_lengths(section, tokenizer, lengths)
    if lengths is not None:
        section = section.model_copy(update={"tasks": ()})  # provenance: they decided nothing
    calibration = draw_calibration(section, source, tokenizer, lengths=wanted, seed=seed, emit=emit)
    absmax = measure_absmax(source, calibration, Env(str(default_device()), seed, emit))
    save_calibration(calibration, calib_dir, absmax)
    return CalibrateResult(
        calib_dir=calib_dir,
        samples=len(calibration.samples),
        samples_wanted=calibration.provenance["samples wanted"],
        tokens=calibration.num_tokens,
        digest=calibration.digest(),
        wanted_lengths=tuple(wanted or ()),
        lengths=tuple(len(sample) for sample in calibration.samples),
    )


def _solve(run: Run, writer: CheckpointWriter) -> tuple[LayerResult, ...]:
    section = run.recipe.calibration
    if section is None or run.calibration is None:
        return solve_data_free(run.source, run.plan, writer, run.env)
    return solve_calibrated(run.source, run.plan, run.calibration, writer, run.env, section)
