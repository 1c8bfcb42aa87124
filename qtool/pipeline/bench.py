"""`bench`: the speed of what was quantized, beside the original."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qtool.base import Emit, Progress, ignore_events
from qtool.checkpoint.reader import CheckpointReader
from qtool.data.corpora import load_corpus
from qtool.modeling.device import free_memory
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location, locate
from qtool.pipeline.cpu_sweep import check_sweep, open_sweep
from qtool.pipeline.evaluate import EvalOptions
from qtool.pipeline.imported import as_ours
from qtool.pipeline.model_figures import ModelFigures, figures_of, versions
from qtool.plugins import check_name
from qtool.runtime.backends._choose import use_backend
from qtool.runtime.decode.cache import use_kv_cache
from qtool.scheme import ActivationScheme, WeightScheme
from qtool.settings import KvCache
from qtool.timing.model import time_model

if TYPE_CHECKING:
    from qtool.timing.cpu import CpuResult
    from qtool.timing.gpu import GpuResult


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuOptions:
    """Kernels that `bench` times, and how."""

    synthetic: str | None = None
    """Shapes of `qtool.timing.shapes`, in place of a checkpoint."""
    scheme: WeightScheme = field(default_factory=lambda: WeightScheme(num_bits=4))
    """Of the synthetic weights."""
    inputs: ActivationScheme | None = None
    """Also time linears of the shapes whose inputs are quantized so; None: none."""
    kernel: str | None = None
    """The kernel to run; None: the one chosen for each layer and batch size."""
    peers: bool = False
    """Also time kernels of other libraries, where they are installed."""
    gpus: int = 1
    """Also run the whole models on so many cards, which share each layer."""
    plot: Path | None = None
    """Where the roofline goes, .png or .svg."""
    kv_cache: KvCache | None = None
    """How whole models keep keys and values; None: by $QTOOL_KV_CACHE, else in their dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuOptions:
    """What `bench` times on the CPU beside the model and its original."""

    gguf_files: tuple[Path, ...] = ()
    """By llama.cpp."""
    llama_python: str | None = None
    """A Python that has llama-cpp-python; None: this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What `bench` times."""

    backend: str | None = None
    """Runs the quantized layers; None: choose."""
    quality: EvalOptions | None = None
    """Measure the perplexity too."""
    gpu: GpuOptions | None = None
    """The GPU kernels layer by layer, then the whole model on them; None: the model alone."""
    cpu: CpuOptions | None = None
    """Where models run on the CPU: by threads, as a share of the read bandwidth, beside others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """The speed of models, the original first; or of kernels, in place of that."""

    figures: tuple[ModelFigures, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    cpu: "CpuResult | None" = None
    """By threads and beside others, if models ran on the CPU."""
    kernels: "GpuResult | None" = None


def bench(
    model: Location | None,
    options: BenchOptions = BenchOptions(),
    *,
    baseline: Location | None = None,
    emit: Emit = ignore_events,
) -> BenchResult:
    """Time a checkpoint, or shapes, and in the same run its original.

    Without a `baseline` that is what the checkpoint names as its source, if anything.

    Raises:
        BackendError: kernels are to be timed, and there is no card.
        MissingExtraError: CuPy or, for a plot, matplotlib isn't installed.
    """
    if options.gpu is not None:
        return BenchResult(kernels=_kernels(model, options.gpu, baseline, emit))
    assert model is not None
    quality, beside = options.quality, options.cpu or CpuOptions()
    python = check_sweep(beside.gguf_files, beside.llama_python)
    corpus = load_corpus(quality.dataset) if quality is not None else None
    model = as_ours(model, emit)
    baseline = as_ours(baseline, emit) if baseline is not None else _original(model)
    models = [one for one in (baseline, model) if one is not None]
    subjects = [figures_of(one) for one in models]
    sweep = None
    if options.cpu is not None:
        sweep = open_sweep(model, beside.gguf_files, python)
    figures = []
    with use_backend(options.backend):
        for one, subject in zip(models, subjects, strict=True):
            loaded, measured = load_model(one), None
            if quality is not None and corpus is not None:
                measured = quality.measure(loaded, corpus, emit)
            emit(Progress(f"time {loaded.name}"))
            figures.append(replace(subject, perplexity=measured, speed=time_model(loaded)))
            if sweep is not None:
                sweep.add(loaded, emit, is_last=one is model)
            del loaded
            free_memory()  # else two models would be alive while the second is loaded
            if sweep is not None and one is baseline:
                sweep.add_rounded(one, emit)
    swept = sweep.result(emit) if sweep is not None else None
    return BenchResult(figures=tuple(figures), versions=versions(), cpu=swept)


def _kernels(
    model: Location | None, options: GpuOptions, baseline: Location | None, emit: Emit
) -> "GpuResult":
    """Time kernels, of a checkpoint or of shapes."""
    from qtool.report import roofline as plots
    from qtool.runtime.backends.cuda.selection import KERNELS
    from qtool.runtime.tensor_parallel import rank_device
    from qtool.timing import gpu, machine, several_cards, shapes, workload
    from qtool.timing.quantized_inputs import input_cases

    kernel, device = options.kernel, machine.require_card()
    if kernel is not None:
        check_name(kernel, KERNELS, "kernels")
    rank_device(0, options.gpus)
    if options.plot is not None:
        plots.check_plot(options.plot)
    if options.synthetic is not None:
        name, scheme = options.synthetic, options.scheme
        shape = shapes.find_shapes(name)
        work = workload.synthetic_workload(name, shape, scheme, kernel, device)
        if options.inputs is not None:
            work = replace(work, quantized_inputs=input_cases(shape, options.inputs))
    else:
        assert model is not None
        model = as_ours(model, emit)
        baseline = as_ours(baseline, emit) if baseline is not None else _original(model)
        work = workload.checkpoint_workload(model, baseline, kernel, device)
    with use_kv_cache(options.kv_cache):
        result = gpu.time_workload(
            work, gpu.on_card(device, kernel), versions(), with_peers=options.peers, emit=emit
        )
    if options.gpus > 1 and work.models:
        emit(Progress(f"time models on {options.gpus} cards"))
        several = several_cards.time_on_cards(work.models, options.gpus, options.kv_cache)
        result = replace(result, several_cards=several)
    if options.plot is not None:
        plots.draw_roofline(options.plot, result)
    return result


def _original(model: Location) -> Location | None:
    """Return what a checkpoint names as its source, if anything."""
    source = CheckpointReader(model.directory).manifest.source
    return locate(source) if source is not None else None
