"""The product in one page: straight-line functions that the command line calls."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qtool
from qtool.base import Emit, Env, ignore_events
from qtool.bench.model import SpeedResult, time_model
from qtool.checkpoint.manifest import LayerEntry, Manifest
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.shards import open_shards, read_json
from qtool.checkpoint.writer import CheckpointWriter, check_free_space, check_replaceable
from qtool.data.calibration import CalibrationSet, load_calibration, save_calibration
from qtool.data.corpora import Corpus, load_corpus
from qtool.errors import CheckpointError
from qtool.evaluation.agreement import (
    Agreement,
    Reference,
    compare_to_reference,
    record_reference,
)
from qtool.evaluation.perplexity import PerplexityResult, perplexity
from qtool.modeling.card import model_card
from qtool.modeling.load import (
    LoadedModel,
    default_device,
    default_dtype,
    load_model,
    load_tokenizer,
)
from qtool.modeling.locate import locate
from qtool.modeling.source import ModelSource, open_source
from qtool.recipe.schema import CalibrationSection, Recipe
from qtool.runtime.select import use_backend, wanted_backend
from qtool.scheme import WeightScheme
from qtool.stages.calibrate import calibrate as draw_calibration
from qtool.stages.calibrate import measure_absmax, save_absmax, wanted_lengths
from qtool.stages.calibrated import solve_calibrated
from qtool.stages.memory import peak_memory
from qtool.stages.plan import Plan, make_plan
from qtool.stages.solve import LayerResult, solve_data_free

if TYPE_CHECKING:
    import torch

    from qtool.bench.gpu import GpuResult
    from qtool.evaluation.task_comparison import TaskComparison
    from qtool.evaluation.tasks import TaskOptions

REPORT_NAME = "quantization_report.json"
FEW_BITS = 3
"""Up to this width, quantization without data is warned of."""


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What a finished run reports; written as quantization_report.json but for `out_dir`."""

    out_dir: Path
    average_bits: float
    weight_bytes: int
    source_bytes: int
    seconds: float
    peak_memory_bytes: int
    device: str
    layers: tuple[LayerResult, ...]


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
        QtoolError: see `qtool.errors`; nothing is left half-written.
    """
    started = time.perf_counter()
    check_replaceable(out_dir, overwrite=overwrite)
    source = open_source(model)
    layer_plan = make_plan(source, recipe)
    check_free_space(out_dir, layer_plan.total_bytes)
    _warn_of_few_bits(layer_plan, recipe, emit)
    env = Env(device=str(default_device()), seed=recipe.seed, emit=emit)
    calibration = _calibration(source, recipe, calib_dir, emit)
    writer = CheckpointWriter(
        out_dir,
        fingerprint=_fingerprint(source, recipe, calibration, env),
        overwrite=overwrite,
        resume=resume,
    )
    with writer:
        results = _solve(source, recipe, layer_plan, calibration, writer, env)
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
        files = source.companions()
        files["README.md"] = model_card(manifest, source.public_name).encode()
        files[REPORT_NAME] = _report(result)
        writer.finish(files, _config(source, manifest))
    return result


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
    tokenizer = load_tokenizer(str(source.directory))
    if directory is not None:
        return load_calibration(directory, tokenizer)
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


def calibrate(
    model: str,
    calib_dir: Path,
    section: CalibrationSection,
    *,
    lengths: tuple[int, ...] | None = None,
    seed: int = 0,
    emit: Emit = ignore_events,
) -> CalibrateResult:
    """Draw calibration samples, measure the inputs of all linears, write both.

    Args:
        model: As for `quantize`.
        calib_dir: Where samples.safetensors, calibration.json and input_absmax.safetensors go.
        section: What to draw.
        lengths: Lengths to match, instead of the tasks' own.
        seed: Of the order of matched lengths.
        emit: Receives `block` events, and a `warning` if the text is too short.
    """
    source = open_source(model)
    tokenizer = load_tokenizer(str(source.directory))
    wanted = wanted_lengths(section, tokenizer, lengths)
    if lengths is not None:
        section = section.model_copy(update={"tasks": ()})  # provenance: they decided nothing
    calibration = draw_calibration(section, source, tokenizer, lengths=wanted, seed=seed, emit=emit)
    absmax = measure_absmax(source, calibration, Env(str(default_device()), seed, emit))
    save_calibration(calibration, calib_dir)
    save_absmax(absmax, calib_dir)
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
    sizes = {spec.file.name: spec.file.stat().st_size for spec in source.shards.specs.values()}
    return {
        "recipe": recipe.model_dump(mode="json"),
        "model": {"config": dict(source.config), "files": dict(sorted(sizes.items()))},
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


def _config(source: ModelSource, manifest: Manifest) -> dict[str, Any]:
    config = {key: value for key, value in source.config.items() if key != "_name_or_path"}
    return {**config, "quantization_config": manifest.to_config()}


def _average_bits(results: tuple[LayerResult, ...]) -> float:
    stored = sum(result.entry.num_bytes() for result in results)
    return 8 * stored / sum(prod(result.entry.shape) for result in results)


def _report(result: QuantizeResult) -> bytes:
    values = {
        key: value for key, value in asdict(result).items() if key not in ("out_dir", "layers")
    }
    values["layers"] = [
        {
            "name": layer.name,
            **layer.metrics,
            "group_dim": layer.entry.scheme.group_dim,
            "fallback": layer.fallback,
            "seconds": layer.seconds,
        }
        for layer in result.layers
    ]
    return (json.dumps({"version of qtool": qtool.__version__, **values}, indent=2) + "\n").encode()


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """All that was measured of one model."""

    name: str
    weight_bytes: int
    average_bits: float
    """Stored bits per weight of the quantized layers; 16 or 32 for an unquantized model."""
    quantize_seconds: float | None = None
    perplexity: PerplexityResult | None = None
    speed: SpeedResult | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Figures of a checkpoint and, measured in the same run, of its original."""

    figures: tuple[ModelFigures, ...]
    agreement: Agreement | None = None
    """How closely the checkpoint follows its original, if both were evaluated."""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """What `evaluate` measures."""

    dataset: str = "wikitext2-test"
    context_length: int = 2048
    max_windows: int | None = None
    agreement_windows: int = 16
    """Windows over which a model is compared with its baseline; 0: it isn't."""

    def measure(self, model: LoadedModel, corpus: Corpus, emit: Emit) -> PerplexityResult:
        """Return the perplexity of a loaded model on the corpus of these options."""
        return perplexity(
            model,
            corpus,
            context_length=self.context_length,
            max_windows=self.max_windows,
            emit=emit,
        )

    def record(self, model: LoadedModel, corpus: Corpus, emit: Emit) -> Reference | None:
        """Return what another model is to be compared with; None: it isn't."""
        if self.agreement_windows == 0:
            return None
        windows = min(self.max_windows or self.agreement_windows, self.agreement_windows)
        length = self.context_length
        return record_reference(
            model, corpus, context_length=length, max_windows=windows, emit=emit
        )


def evaluate(
    model: str,
    options: EvalOptions,
    *,
    baseline: str | None = None,
    backend: str | None = None,
    dtype: "torch.dtype | None" = None,
    emit: Emit = ignore_events,
) -> Comparison:
    """Measure the perplexity of a model and, if given, of a baseline beside it.

    With a baseline also how closely the model follows it; the two are never in memory at once.
    """
    corpus = load_corpus(options.dataset)
    figures, reference = [], None
    if baseline is not None:
        with _loaded(baseline, backend, dtype) as loaded:
            figures.append(_figures(loaded, perplexity=options.measure(loaded, corpus, emit)))
            reference = options.record(loaded, corpus, emit)
        del loaded
    with _loaded(model, backend, dtype) as loaded:
        figures.append(_figures(loaded, perplexity=options.measure(loaded, corpus, emit)))
        agreement = compare_to_reference(loaded, reference, emit) if reference else None
    return Comparison(tuple(figures), agreement, versions())


def evaluate_tasks(
    model: str,
    options: "TaskOptions",
    *,
    baseline: str | None = None,
    backend: str | None = None,
    dtype: "torch.dtype | None" = None,
    emit: Emit = ignore_events,
) -> "TaskComparison":
    """Run tasks of lm-eval on a model and, if given, on a baseline: the same items, one by one.

    Raises:
        MissingExtraError: lm-eval isn't installed.
        DataError: before a model is loaded: a task is unknown, its data is missing, or it runs
            programs that the model writes and nobody has agreed.
    """
    from qtool.evaluation import kept_scores, sandbox, task_comparison
    from qtool.evaluation.tasks import check_tasks, run_tasks

    tasks = check_tasks(options)
    device = default_device()
    dtype = dtype or default_dtype(device)

    def measure(name: str) -> task_comparison.ModelTasks:
        location = locate(name)
        public = location.public_name or location.directory.resolve().name
        figures = figures_of(public, location.directory)
        subject = {
            "digest": kept_scores.model_digest(location.directory),
            "dtype": str(dtype).removeprefix("torch."),
            "device": kept_scores.device_name(device),
            "backend": backend or wanted_backend(),
        }
        with use_backend(backend):
            scores = run_tasks(lambda: load_model(name, dtype=dtype), subject, tasks, options, emit)
        size, bits = figures.weight_bytes, figures.average_bits
        return task_comparison.ModelTasks(figures.name, size, bits, scores)

    original = measure(baseline) if baseline is not None else None
    measured = measure(model)
    return task_comparison.TaskComparison(
        model=measured,
        original=original,
        rows=task_comparison.score_rows(measured, original),
        protections=sandbox.protections() if tasks.unsafe(options.tasks) else (),
        versions={**versions(), **kept_scores.versions()},
    )


def bench(
    model: str,
    *,
    baseline: str | None = None,
    backend: str | None = None,
    quality: EvalOptions | None = None,
    emit: Emit = ignore_events,
) -> Comparison:
    """Time a checkpoint and, in the same run, its original.

    Args:
        model: The checkpoint.
        baseline: The original; None: what the checkpoint names as its source, if anything.
        backend: Run the quantized layers with this backend; None: choose.
        quality: Measure the perplexity too.
        emit: Receives `window` and `timing` events.
    """
    reader = CheckpointReader(Path(model))
    baseline = baseline or reader.manifest.source
    corpus = load_corpus(quality.dataset) if quality else None
    figures = []
    for name in (baseline, model):
        if name is None:
            continue
        with _loaded(name, backend) as loaded:
            measured = None
            if quality is not None and corpus is not None:
                measured = quality.measure(loaded, corpus, emit)
            emit("timing", {"name": loaded.name})
            figures.append(_figures(loaded, perplexity=measured, speed=time_model(loaded)))
    return Comparison(tuple(figures), versions=versions())


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuOptions:
    """What `bench_gpu` times, and how."""

    synthetic: str | None = None
    """Shapes of `qtool.bench.shapes`, in place of a checkpoint."""
    scheme: WeightScheme = field(default_factory=lambda: WeightScheme(num_bits=4))
    """Of the synthetic weights."""
    kernel: str | None = None
    """The kernel to run; None: the one chosen for each layer and batch size."""
    peers: bool = False
    """Also time kernels of other libraries, where they are installed."""
    plot: Path | None = None
    """Where the roofline goes, .png or .svg."""


def bench_gpu(
    model: str,
    options: GpuOptions,
    *,
    baseline: str | None = None,
    emit: Emit = ignore_events,
) -> "GpuResult":
    """Time the GPU kernels layer by layer, then the whole model and its original.

    Args:
        model: The checkpoint; not looked at if shapes are asked for.
        options: What and how.
        baseline: The original; None: what the checkpoint names as its source, if anything.
        emit: Receives `timing` events.

    Raises:
        BackendError: there is no card.
        MissingExtraError: CuPy or, for a plot, matplotlib isn't installed.
    """
    from qtool.bench import gpu, machine, plots, shapes, workload

    kernel, device = options.kernel, machine.require_card()
    gpu.check_kernel(kernel)
    if options.plot is not None:
        plots.check_plot(options.plot)
    if options.synthetic is not None:
        name, scheme = options.synthetic, options.scheme
        work = workload.synthetic_workload(name, shapes.find(name), scheme, kernel, device)
    else:
        baseline = baseline or CheckpointReader(Path(model)).manifest.source
        work = workload.checkpoint_workload(Path(model), baseline, kernel, device)
    result = gpu.run(
        *(work, gpu.on_card(device), versions()), kernel=kernel, with_peers=options.peers, emit=emit
    )
    if options.plot is not None:
        plots.draw_roofline(options.plot, result)
    return result


@contextmanager
def _loaded(
    name: str, backend: str | None, dtype: "torch.dtype | None" = None
) -> Iterator[LoadedModel]:
    with use_backend(backend):
        yield load_model(name, dtype=dtype)


def _figures(
    loaded: LoadedModel,
    *,
    perplexity: PerplexityResult | None = None,
    speed: SpeedResult | None = None,
) -> ModelFigures:
    """Return what is measured of a model beside what its directory says."""
    figures = figures_of(loaded.name, loaded.directory)
    return replace(figures, perplexity=perplexity, speed=speed)


def figures_of(name: str, directory: Path) -> ModelFigures:
    """Return size and bits of a model, which its directory says without loading it."""
    shards = open_shards(directory)
    size = sum(file.stat().st_size for file in {spec.file for spec in shards.specs.values()})
    config = read_json(directory / "config.json").get("quantization_config")
    if config is None:
        bits = 32.0 if any(spec.dtype == "F32" for spec in shards.specs.values()) else 16.0
        return ModelFigures(name, size, bits)
    bits = CheckpointReader(directory).manifest.average_bits()
    return ModelFigures(name, size, bits, quantize_seconds(directory))


def quantize_seconds(directory: Path) -> float | None:
    """Return how long the quantization of a checkpoint took, if its report is there."""
    try:
        return float(read_json(directory / REPORT_NAME)["seconds"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    import platform

    import torch
    import transformers

    return {
        "qtool": qtool.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
