"""Measuring what was quantized: quality and speed, beside the original."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import qtool
from qtool.base import Emit, ignore_events
from qtool.bench.model import SpeedResult, time_model
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.shards import open_shards, read_json
from qtool.data.corpora import Corpus, load_corpus
from qtool.errors import CheckpointError
from qtool.evaluation.agreement import (
    Agreement,
    Reference,
    compare_to_reference,
    record_reference,
)
from qtool.evaluation.perplexity import PerplexityResult, perplexity
from qtool.modeling.load import LoadedModel, load_model
from qtool.modeling.locate import locate
from qtool.pipeline.quantizing import REPORT_NAME
from qtool.runtime.select import use_backend
from qtool.scheme import WeightScheme

if TYPE_CHECKING:
    import torch

    from qtool.bench.gpu import GpuResult


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
    texts: bool = True
    """Also compare greedy continuations with those of the baseline."""

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
        fewer = {} if self.texts else {"prompts": 0}
        return record_reference(
            *(model, corpus),
            context_length=length,
            max_windows=windows,
            emit=emit,
            **fewer,
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
    locate(model)  # a typo is found before the baseline has run
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
