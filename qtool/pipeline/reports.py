"""What a finished run writes beside its weights, and quantization_report.json read again."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import nan, prod
from pathlib import Path
from statistics import mean
from typing import Any

import qtool
from qtool.base import Emit, Notice, Progress
from qtool.checkpoint.manifest import LayerEntry, Manifest
from qtool.checkpoint.marks import CARD_NAME, CONFIG_NAME, REPORT_NAME, read_report
from qtool.checkpoint.place import Place
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.writer import CheckpointWriter
from qtool.choosing.choose import Allocation
from qtool.choosing.search.q_rater import Found
from qtool.errors import CheckpointError
from qtool.evaluation.closeness import Closeness
from qtool.pipeline.card import written_card
from qtool.pipeline.model_figures import versions
from qtool.report.verdict import GateLine
from qtool.steps.beside import unquantized
from qtool.steps.correct_biases import corrections
from qtool.steps.coverage import coverage
from qtool.steps.fallbacks import kept_fallbacks, kept_warnings
from qtool.steps.memory import peak_memory
from qtool.steps.run import Run
from qtool.steps.solve import LayerResult
from qtool.storage.plain_json import json_text
from qtool.wording import quoted

NOT_METRICS = ("name", "group_dim", "fallback", "seconds")


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What a finished run reports; `NUMBERS` and `layers` are in quantization_report.json."""

    out_dir: Path
    average_bits: float
    weight_bytes: int
    source_bytes: int
    seconds: float
    peak_memory_bytes: int
    device: str
    layers: tuple[LayerResult, ...]
    tuning: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Held-out loss before and after: `blocks`, relative error of their outputs on average, and
    `model`, KL to the original in nats per token."""
    choosing: Mapping[str, Any] = field(default_factory=dict)
    """What was chosen for all layers that were open; empty: none was. See `Allocation.summary`."""
    search: Mapping[str, Any] = field(default_factory=dict)
    """What a search found, and how long it took; empty: there was none. See `Found.summary`."""
    bias_correction: Mapping[str, Any] = field(default_factory=dict)
    """By block, which biases were corrected, and the held-out error of its output before and after;
    empty: none were to be. See `Correction`."""
    experts: Mapping[str, Any] = field(default_factory=dict)
    """Calibration tokens of each expert; empty: there are none. See `coverage`."""
    unquantized: Mapping[str, str] = field(default_factory=dict)
    """Why each other weight of two dimensions and more isn't quantized, by its full name."""
    fallbacks: tuple[str, ...] = ()
    """What was done in smaller parts because memory was full: a sentence each."""
    check: Closeness | None = None
    """How closely the result follows its original, if it was compared."""
    budgets: tuple[GateLine, ...] = ()
    """What became of the budgets of the recipe's section `check`, if it was compared."""


@dataclass(frozen=True, slots=True)
class Decisions:
    """What was decided before anything was solved; None: the recipe left nothing open."""

    allocation: Allocation | None = None
    found: Found | None = None


@dataclass(frozen=True, slots=True)
class RunCourse:
    """How a run goes: passes events on, and keeps what it warns of."""

    started: float
    """In seconds of `perf_counter`."""
    emit: Emit
    notices: list[str] = field(default_factory=list)

    def hear(self, event: Progress | Notice) -> None:
        """Pass an event on; a warning is noted once."""
        if isinstance(event, Notice) and event.message not in self.notices:
            self.notices.append(event.message)
        self.emit(event)


Curves = Mapping[str, Sequence[Mapping[str, Any]]]
CURVES_NAME = "tuning.jsonl"
TRIALS_NAME = "search.jsonl"
NUMBERS = ("average_bits", "weight_bytes", "source_bytes", "seconds", "peak_memory_bytes", "device")
OPTIONAL = ("choosing", "search", "bias_correction", "experts", "unquantized")
OF_SAMPLES = (
    *("dataset", "sources", "samples", "tokens"),
    *("special tokens", "special tokens missing"),
    *("requested lengths", "used lengths"),
)


def write_result(
    run: Run,
    results: tuple[LayerResult, ...],
    curves: Curves,
    writer: CheckpointWriter,
    course: RunCourse,
    decisions: Decisions,
) -> QuantizeResult:
    """Write all files of a result, and give it its name.

    Raises:
        QtoolError: see `CheckpointWriter.finish`.
    """
    stored = sum(result.entry.num_bytes() for result in results)
    result = QuantizeResult(
        out_dir=writer.place.named,
        average_bits=8 * stored / sum(prod(result.entry.shape) for result in results),
        weight_bytes=run.plan.kept_bytes + stored,
        source_bytes=run.plan.source_bytes,
        seconds=time.perf_counter() - course.started,
        peak_memory_bytes=peak_memory(run.env.device),
        device=run.env.device,
        layers=results,
        tuning=_gains(curves),
        choosing=decisions.allocation.summary() if decisions.allocation else {},
        search=decisions.found.summary() if decisions.found else {},
        bias_correction=corrections(run, writer),
        experts=coverage(results),
        unquantized=unquantized(run.source, run.recipe, run.plan.kept),
        fallbacks=kept_fallbacks(writer),
    )
    manifest, files = _manifest(run, result, writer.digests()), run.source.companions()
    sizes = result.weight_bytes, result.source_bytes
    files[CARD_NAME] = written_card(run, results, manifest, sizes)
    if curves:
        files[CURVES_NAME] = _curve_lines(curves)
    if decisions.found is not None:
        files[TRIALS_NAME] = _lines(decisions.found.lines())
    names = sorted({*files, REPORT_NAME, CONFIG_NAME})
    samples = run.calibration.provenance if run.calibration else {}
    notices = _notices(course, kept_warnings(writer))
    files[REPORT_NAME] = _report_bytes(result, samples, notices, run=writer.run_digest, files=names)
    config = {key: value for key, value in run.source.config.items() if key != "_name_or_path"}
    writer.finish(files, {**config, "quantization_config": manifest.to_config()})
    return result


def _gains(curves: Curves) -> dict[str, tuple[float, float]]:
    """Return the held-out loss where curves begin, and where they are lowest."""
    losses = {what: [point["held_out"] for point in curve] for what, curve in curves.items()}
    model = losses.pop("model", None)
    found = {} if model is None else {"model": (model[0], min(model))}
    if losses:
        both = [(loss[0], min(loss)) for loss in losses.values()]
        found = {"blocks": (mean(x for x, _ in both), mean(x for _, x in both)), **found}
    return found


def _curve_lines(curves: Curves) -> bytes:
    return _lines([{"of": what, **point} for what, curve in curves.items() for point in curve])


def _lines(values: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json_text(value, indent=None) + "\n" for value in values).encode()


def _manifest(run: Run, made: QuantizeResult, digests: dict[str, str]) -> Manifest:
    layers = {layer.name: layer.entry for layer in made.layers}
    if run.plan.tied_head is not None:
        embedding = run.source.adapter.embedding
        layers[run.plan.tied_head] = replace(layers[embedding], shared_with=embedding)
    return Manifest(
        tool_version=qtool.__version__,
        recipe=run.recipe.model_dump(mode="json"),
        layers=layers,
        source=run.source.public_name,
        calibration=run.calibration.digest() if run.calibration else None,
        unquantized=made.unquantized,
        digests=digests,
    )


def _notices(course: RunCourse, kept: Sequence[str]) -> list[str]:
    """Return warnings in the order of a run that was never stopped: `kept` come last."""
    return [*(message for message in course.notices if message not in kept), *kept]


def _report_bytes(
    result: QuantizeResult,
    samples: Mapping[str, Any],
    notices: Sequence[str],
    *,
    run: str,
    files: list[str],
) -> bytes:
    """Return the content of the report.

    Of the provenance of the samples it has what says how good a calibration they are.
    `run` tells it from all others: a run that has ended isn't done again. `files` are the names
    that it writes beside the weights, so that --overwrite knows them as ours.
    """
    values = asdict(result)
    layers = [
        {
            "name": layer.name,
            **layer.metrics,
            "group_dim": layer.entry.scheme.group_dim,
            "fallback": layer.fallback,
            "seconds": layer.seconds,
        }
        for layer in result.layers
    ]
    report = {
        "version of qtool": qtool.__version__,
        "run": run,
        "files": files,
        **{key: values[key] for key in NUMBERS},
        "calibration": {key: samples[key] for key in OF_SAMPLES if key in samples},
        "notices": list(notices),
        "versions": versions(),
        "tuning": values["tuning"],
        **{key: values[key] for key in (*OPTIONAL, "fallbacks") if values[key]},
        "layers": layers,
    }
    return (json_text(report) + "\n").encode()


def result_of(place: Place) -> QuantizeResult:
    """Return what the run reported whose result is there.

    Raises:
        CheckpointError: the report is missing or damaged.
    """
    report, entries = read_report(place.out_dir), CheckpointReader(place.out_dir).manifest.layers
    try:
        layers = tuple(_layer(values, entries) for values in report["layers"])
        numbers = {key: report[key] for key in NUMBERS}
        tuning = {what: tuple(pair) for what, pair in report.get("tuning", {}).items()}
        return QuantizeResult(
            out_dir=place.named,
            layers=layers,
            tuning=tuning,
            fallbacks=tuple(report.get("fallbacks", ())),
            **{key: report.get(key, {}) for key in OPTIONAL},
            **numbers,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{place.out_dir} is complete, but its quantization_report.json is damaged: "
            f"{quoted(error)}."
        ) from error


def _layer(values: Mapping[str, Any], entries: Mapping[str, LayerEntry]) -> LayerResult:
    metrics = {
        key: nan if value is None else float(value)
        for key, value in values.items()
        if key not in NOT_METRICS
    }
    name = values["name"]
    return LayerResult(name, entries[name], metrics, values["seconds"], values["fallback"])
