"""Measuring what was quantized: quality and speed, beside the original."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from qtool.base import Emit, Notice, Progress, ignore_events
from qtool.bench.model import time_model
from qtool.checkpoint.reader import CheckpointReader
from qtool.data.corpora import Corpus, load_corpus
from qtool.errors import QtoolError
from qtool.evaluation.agreement import (
    Agreement,
    Reference,
    compare_to_reference,
    record_reference,
)
from qtool.evaluation.perplexity import PerplexityResult, perplexity
from qtool.modeling.load import LoadedModel, load_model
from qtool.modeling.locate import Location, locate
from qtool.pipeline.model_figures import ModelFigures, figures_of, versions
from qtool.pipeline.scoring import score
from qtool.plugins import check_name
from qtool.runtime.select import use_backend
from qtool.scheme import WeightScheme

if TYPE_CHECKING:
    import torch

    from qtool.bench.gpu import GpuResult
    from qtool.evaluation.lm_eval.options import TaskOptions
    from qtool.pipeline.task_results import TaskComparison

_T = TypeVar("_T")
PROMPTS = 4
"""Beginnings that a model and its baseline continue."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Figures of a checkpoint and, measured in the same run, of its original."""

    figures: tuple[ModelFigures, ...]
    agreement: Agreement | None = None
    """How closely the checkpoint follows its original, if both were evaluated."""
    versions: dict[str, str] = field(default_factory=dict)
    tasks: "TaskComparison | None" = None
    """If tasks were asked for, in place of all above."""
    kernels: "GpuResult | None" = None
    """If kernels were timed, likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """What `evaluate` measures."""

    tasks: "TaskOptions | None" = None
    """Tasks of lm-eval; None: a text."""

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
        return record_reference(
            model,
            corpus,
            context_length=length,
            max_windows=windows,
            prompts=PROMPTS if self.texts else 0,
            emit=emit,
        )


def evaluate(
    model: Location,
    options: EvalOptions,
    *,
    baseline: Location | None = None,
    backend: str | None = None,
    dtype: "torch.dtype | None" = None,
    emit: Emit = ignore_events,
) -> Comparison:
    """Measure a model and, if given, a baseline beside it; the two are never in memory at once.

    Of a text the perplexity, and with a baseline also how closely the model follows it; where that
    can't be said, a warning says why, and the perplexities stand. Of tasks the scores.

    Raises:
        QtoolError: before a model is loaded: one isn't there, or can't be executed here; or as
            `scoring.score`.
    """
    if options.tasks is not None:
        scored = score(model, options.tasks, baseline, backend, dtype, emit)
        return Comparison((), tasks=scored)
    corpus = load_corpus(options.dataset)
    subjects = {one: _subject(one) for one in (model, baseline) if one is not None}
    figures, reference = [], None
    if baseline is not None:
        with _loaded(baseline, backend, dtype) as loaded:
            measured = options.measure(loaded, corpus, emit)
            reference = _if_possible(lambda: options.record(loaded, corpus, emit), emit)
        figures.append(replace(subjects[baseline], perplexity=measured))
        del loaded
        _free_memory()
    with _loaded(model, backend, dtype) as loaded:
        measured = options.measure(loaded, corpus, emit)
        agreement = None
        if reference is not None:
            found = reference
            agreement = _if_possible(lambda: compare_to_reference(loaded, found, emit), emit)
    figures.append(replace(subjects[model], perplexity=measured))
    return Comparison(tuple(figures), agreement, versions())


def _if_possible(compare: Callable[[], _T], emit: Emit) -> _T | None:
    """Return a comparison, or None after a warning: what was measured before isn't lost to it."""
    try:
        return compare()
    except QtoolError as error:
        emit(Notice(f"The two models aren't compared token by token: {error}"))
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuOptions:
    """Kernels that `bench` times, and how."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What `bench` times."""

    backend: str | None = None
    """Runs the quantized layers; None: choose."""
    quality: EvalOptions | None = None
    """Measure the perplexity too."""
    gpu: GpuOptions | None = None
    """The GPU kernels layer by layer, then the whole model on them; None: the model alone."""


def bench(
    model: Location | None,
    options: BenchOptions = BenchOptions(),
    *,
    baseline: Location | None = None,
    emit: Emit = ignore_events,
) -> Comparison:
    """Time a checkpoint and, in the same run, its original.

    Args:
        model: The checkpoint; None if shapes are asked for.
        options: What and how.
        baseline: The original; None: what the checkpoint names as its source, if anything.
        emit: Is told of each window, and what is timed.

    Raises:
        BackendError: kernels are to be timed, and there is no card.
        MissingExtraError: CuPy or, for a plot, matplotlib isn't installed.
    """
    if options.gpu is not None:
        return Comparison((), kernels=_kernels(model, options.gpu, baseline, emit))
    assert model is not None
    baseline = baseline or _original(model)
    corpus = load_corpus(options.quality.dataset) if options.quality else None
    models = [one for one in (baseline, model) if one is not None]
    subjects = [_subject(one) for one in models]
    figures = []
    for one, subject in zip(models, subjects, strict=True):
        figures.append(_timed(one, subject, options, corpus, emit))
        _free_memory()  # else two models would be alive while the second is loaded
    return Comparison(tuple(figures), versions=versions())


def _timed(
    model: Location,
    subject: ModelFigures,
    options: BenchOptions,
    corpus: Corpus | None,
    emit: Emit,
) -> ModelFigures:
    with _loaded(model, options.backend) as loaded:
        measured = None
        if options.quality is not None and corpus is not None:
            measured = options.quality.measure(loaded, corpus, emit)
        emit(Progress(f"time {loaded.name}"))
        return replace(subject, perplexity=measured, speed=time_model(loaded))


def _kernels(
    model: Location | None, options: GpuOptions, baseline: Location | None, emit: Emit
) -> "GpuResult":
    """Time kernels, of a checkpoint or of shapes."""
    from qtool.bench import gpu, machine, plots, shapes, workload
    from qtool.runtime.selection import KERNELS

    kernel, device = options.kernel, machine.require_card()
    if kernel is not None:
        check_name(kernel, KERNELS, "kernels")
    if options.plot is not None:
        plots.check_plot(options.plot)
    if options.synthetic is not None:
        name, scheme = options.synthetic, options.scheme
        work = workload.synthetic_workload(name, shapes.find_shapes(name), scheme, kernel, device)
    else:
        assert model is not None
        baseline = baseline or _original(model)
        work = workload.checkpoint_workload(model, baseline, kernel, device)
    result = gpu.time_workload(
        *(work, gpu.on_card(device), versions()), kernel=kernel, with_peers=options.peers, emit=emit
    )
    if options.plot is not None:
        plots.draw_roofline(options.plot, result)
    return result


@contextmanager
def _loaded(
    model: Location, backend: str | None, dtype: "torch.dtype | None" = None
) -> Iterator[LoadedModel]:
    with use_backend(backend):
        yield load_model(model, dtype=dtype)


def _original(model: Location) -> Location | None:
    """Return what a checkpoint names as its source, if anything."""
    source = CheckpointReader(model.directory).manifest.source
    return locate(source) if source is not None else None


def _free_memory() -> None:
    """Let go of a model that nobody names any more: it is in a cycle."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()  # nothing, without a card


def _subject(model: Location) -> ModelFigures:
    """Return what a model's directory says of it, before it is loaded."""
    return figures_of(model.name, model.directory)
