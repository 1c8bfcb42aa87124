"""Calibrating and quantizing, from a request to what is on disk."""

import time
from dataclasses import dataclass, replace
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import qtool
from qtool.base import Emit, Env, ignore_events
from qtool.checkpoint.apart import check_apart
from qtool.checkpoint.claim import look
from qtool.checkpoint.manifest import LayerEntry, Manifest
from qtool.checkpoint.marks import CONFIG_NAME, REPORT_NAME
from qtool.checkpoint.place import Place, check_free_space, find_place
from qtool.checkpoint.writer import MAX_SHARD_BYTES, CheckpointWriter, run_digest
from qtool.data.calibration import CalibrationSet
from qtool.data.calibration_files import (
    check_no_calibration,
    load_calibration,
    save_calibration,
)
from qtool.modeling.card import Provenance, model_card, read_licence
from qtool.modeling.device import default_device
from qtool.modeling.load import load_tokenizer
from qtool.modeling.source import ModelSource, open_source
from qtool.pipeline.reports import QuantizeResult, report_bytes, result_of
from qtool.recipe.schema import CalibrationSection, Recipe
from qtool.stages.calibrate import calibrate as draw_calibration
from qtool.stages.calibrate import check_samples, measure_absmax, wanted_lengths
from qtool.stages.calibrated import solve_calibrated
from qtool.stages.memory import failures_in_one_line, peak_memory
from qtool.stages.plan import Plan, make_plan
from qtool.stages.solve import LayerResult, solve_data_free
from qtool.storage.digests import files_digest

FEW_BITS = 3
"""Up to this width, quantization without data is warned of."""
NO_LOCKS = (
    "The disk of OUT_DIR has no locks, so nothing keeps a second run from writing there as well."
)


def plan(model: str, recipe: Recipe) -> Plan:
    """Return what `quantize` would do, with bits and bytes per layer; reads no weights."""
    return make_plan(open_source(model), recipe)


def quantize(  # noqa: PLR0913 - what, where to, how, and three switches
    model: str,
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
        model: Local directory, hub id, `.gguf` file, or `demo:smollm2`.
        out_dir: Where the checkpoint goes; appears only when it is complete.
        recipe: All that decides the result.
        calib_dir: Samples that `calibrate` drew; None: draw them as the recipe says.
        overwrite: Replace a checkpoint that is there, and drop an unfinished run.
        resume: Continue an unfinished run of the same recipe.
        emit: Receives `layer` events.

    Raises:
        QtoolError: see `qtool.errors`; finished layers are kept for `resume`, and what is at
            `out_dir` stays as it was.
    """
    started = time.perf_counter()
    place = find_place(out_dir)
    if Path(model).is_dir():
        check_apart(place.out_dir, Path(model))  # before anything is said of --overwrite
    look(place, overwrite=overwrite, resume=resume)
    _phase(emit, "opening the model")
    source = open_source(model)
    check_apart(place.out_dir, source.directory, _inputs(recipe, calib_dir))
    layer_plan = make_plan(source, recipe)
    _check_room(place, layer_plan)
    _warn_of_few_bits(layer_plan, recipe, emit)
    env = Env(device=str(default_device()), seed=recipe.seed, emit=emit)
    calibration = _calibration(source, recipe, calib_dir, emit)
    _check_room(place, layer_plan, _stream_bytes(source, recipe, calibration))
    _phase(emit, "reading the model's files")
    fingerprint = _fingerprint(source, recipe, calibration, env)
    with (
        CheckpointWriter(
            out_dir, fingerprint=fingerprint, overwrite=overwrite, resume=resume
        ) as writer,
        failures_in_one_line(env.device, place.out_dir),
    ):
        if not writer.is_locked:
            emit("warning", {"message": NO_LOCKS})
        if writer.is_sealed:
            writer.publish()
        if writer.is_sealed or writer.has_ended:
            return result_of(out_dir, place.out_dir)
        results = _solve(source, recipe, layer_plan, calibration, writer, env)
        _phase(emit, "assembling the result")
        result = QuantizeResult(
            out_dir=out_dir,
            average_bits=_average_bits(results),
            weight_bytes=layer_plan.kept_bytes + sum(r.entry.num_bytes() for r in results),
            source_bytes=layer_plan.source_bytes,
            seconds=time.perf_counter() - started,
            peak_memory_bytes=peak_memory(env.device),
            device=env.device,
            layers=results,
        )
        manifest = _manifest(source, recipe, layer_plan, results, calibration)
        manifest = replace(manifest, digests=writer.digests())
        files = source.companions()
        about = _about(source, calibration, result)
        files["README.md"] = model_card(manifest, source.public_name, about).encode()
        names = sorted({*files, REPORT_NAME, CONFIG_NAME})
        files[REPORT_NAME] = report_bytes(result, run=run_digest(fingerprint), files=names)
        writer.finish(files, _config(source, manifest))
    return result


def _phase(emit: Emit, name: str) -> None:
    emit("phase", {"name": name})


def _inputs(recipe: Recipe, calib_dir: Path | None) -> list[Path]:
    """Return what a run reads beside the model."""
    dataset = Path(recipe.calibration.dataset) if recipe.calibration else None
    return [path for path in (calib_dir, dataset) if path is not None and path.exists()]


def _check_room(place: Place, layer_plan: Plan, streams: int = 0) -> None:
    """Check the disk; the inputs of the blocks are gone before shards are assembled."""
    shard = min(layer_plan.total_bytes, MAX_SHARD_BYTES)
    check_free_space(place, layer_plan.total_bytes, besides=max(shard, streams))


def _stream_bytes(source: ModelSource, recipe: Recipe, calibration: CalibrationSet | None) -> int:
    """Return what the block inputs of both models take on disk, in float32."""
    if calibration is None or recipe.calibration is None or recipe.calibration.cache != "disk":
        return 0
    width = source.weight_shape(source.adapter.embedding).in_features
    return 2 * 4 * calibration.num_tokens * width


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
    tokenizer = load_tokenizer(str(source.directory))
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
    model: str,
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
    tokenizer = load_tokenizer(str(source.directory))
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


def _solve(
    source: ModelSource,
    recipe: Recipe,
    layer_plan: Plan,
    calibration: CalibrationSet | None,
    writer: CheckpointWriter,
    env: Env,
) -> tuple[LayerResult, ...]:
    section = recipe.calibration
    if section is None or calibration is None:
        return solve_data_free(source, layer_plan, writer, env)
    return solve_calibrated(source, layer_plan, calibration, writer, env, section)


def _fingerprint(
    source: ModelSource, recipe: Recipe, calibration: CalibrationSet | None, env: Env
) -> dict[str, Any]:
    """Return all that decides the output: a resumed run must agree on it."""
    chosen = recipe.model_dump(mode="json")
    if recipe.calibration is not None:
        del chosen["calibration"]["strict"]  # it ends a run, and decides nothing of its result
    companions = {
        name: sha256(content).hexdigest() for name, content in source.companions().items()
    }
    weights = files_digest(spec.file for spec in source.shards.specs.values())
    return {
        "recipe": chosen,
        "model": {"config": dict(source.config), "files": companions, "weights": weights},
        "calibration": calibration.digest() if calibration else None,
        "device": env.device.partition(":")[0],
        "version of qtool": qtool.__version__,
    }


def _manifest(
    source: ModelSource,
    recipe: Recipe,
    layer_plan: Plan,
    results: tuple[LayerResult, ...],
    calibration: CalibrationSet | None,
) -> Manifest:
    layers = {result.name: result.entry for result in results}
    if layer_plan.tied_head is not None:
        table = layers[source.adapter.embedding]
        layers[layer_plan.tied_head] = LayerEntry(
            format=table.format,
            scheme=table.scheme,
            shape=table.shape,
            method=table.method,
            shared_with=source.adapter.embedding,
        )
    return Manifest(
        tool_version=qtool.__version__,
        recipe=recipe.model_dump(mode="json"),
        layers=layers,
        source=source.public_name,
        calibration=calibration.digest() if calibration else None,
    )


def _about(
    source: ModelSource, calibration: CalibrationSet | None, result: QuantizeResult
) -> Provenance:
    """Return what the model card says of a run."""
    names = {"added_error": "error added to the outputs", "nmse": "error of the weights (NMSE)"}
    values = {
        name: [layer.metrics[key] for layer in result.layers if key in layer.metrics]
        for key, name in names.items()
    }
    return Provenance(
        licence=read_licence(source.directory),
        calibration=calibration.provenance if calibration else {},
        weight_bytes=result.weight_bytes,
        source_bytes=result.source_bytes,
        num_weights=sum(prod(spec.shape) for spec in source.shards.specs.values()),
        errors={name: sum(found) / len(found) for name, found in values.items() if found},
    )


def _config(source: ModelSource, manifest: Manifest) -> dict[str, Any]:
    config = {key: value for key, value in source.config.items() if key != "_name_or_path"}
    return {**config, "quantization_config": manifest.to_config()}


def _average_bits(results: tuple[LayerResult, ...]) -> float:
    stored = sum(result.entry.num_bytes() for result in results)
    return 8 * stored / sum(prod(result.entry.shape) for result in results)
