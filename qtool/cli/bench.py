"""`qtool bench`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from qtool.cli import console, early
from qtool.cli.options import (
    AdapterOption,
    BackendOption,
    DeviceOption,
    JsonOption,
    KvCacheOption,
    check_targets,
    in_panel,
    wrong_plot_name,
)
from qtool.cli.progress import progress
from qtool.cli.tables.kernels import gpu_report, print_gpu_result
from qtool.cli.tables.models import print_models, speed_report
from qtool.cli.tables.processors import print_cpu_result
from qtool.scheme import ActivationScheme, WeightScheme

DEFAULT_BITS, DEFAULT_GROUP_SIZE = 4, 128
NOT_KEPT = "Nothing was kept."
NO_ORIGINAL = (
    "No original is beside it: the checkpoint was made from a local model, whose path isn't kept. "
    "Give it with --baseline MODEL."
)
NEEDING = {
    "--gpu": ("kernel", "peers", "plot", "kv_cache", "gpus"),
    "--synthetic": ("bits", "group_size", "input_bits"),
}
CLASHES = {
    "--gpu": ("backend", "perplexity_windows", "gguf", "llama_python", "no_sweep"),
    "--synthetic": ("baseline", "out_dir"),
    "--no-sweep": ("gguf", "llama_python"),
}
_of_gpu = in_panel("With --gpu")
_of_cpu = in_panel("On the CPU")
SHAPES = "llama3-8b, llama2-7b, llama2-70b, llama2-70b-layer, opt-175b-layer or llama3-8b-heads"


def bench(
    context: typer.Context,
    out_dir: Annotated[str | None, typer.Argument(help="Checkpoint; not with --synthetic.")] = None,
    gpu: Annotated[
        bool,
        typer.Option("--gpu", help="Time the GPU kernels, layer by layer, and decoding on them."),
    ] = False,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Original to time beside it; default: the source, unless it was a local directory."
        ),
    ] = None,
    perplexity_windows: Annotated[
        int, typer.Option(metavar="N", min=0, help="Also measure perplexity on this many windows.")
    ] = 0,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
    kv_cache: KvCacheOption = None,
    json_file: JsonOption = None,
    synthetic: Annotated[
        str | None, _of_gpu(help=f"Random weights of known shapes: {SHAPES}. Implies --gpu.")
    ] = None,
    bits: Annotated[
        int | None,
        _of_gpu(metavar="N", min=1, max=8, help=f"Of --synthetic; default {DEFAULT_BITS}."),
    ] = None,
    group_size: Annotated[
        int | None,
        _of_gpu(metavar="N", min=1, help=f"Of --synthetic; default {DEFAULT_GROUP_SIZE}."),
    ] = None,
    input_bits: Annotated[
        int | None,
        _of_gpu(
            metavar="N",
            min=2,
            max=8,
            help="With --synthetic: also time linears whose inputs are quantized per token.",
        ),
    ] = None,
    kernel: Annotated[
        str | None,
        _of_gpu(help="Run planes, lut, wide, dequantize or sign_flip; default: a layer's own."),
    ] = None,
    peers: Annotated[
        bool,
        _of_gpu("--peers", help="Also time kernels of other libraries, where installed."),
    ] = False,
    gpus: Annotated[
        int,
        _of_gpu("--gpus", metavar="N", min=1, help="Also decode on N cards that share each layer."),
    ] = 1,
    plot: Annotated[Path | None, _of_gpu(help="Draw the roofline: .png or .svg.")] = None,
    gguf: Annotated[
        list[Path] | None,
        _of_cpu(metavar="FILE", help="Time this file too, by llama.cpp; may be given repeatedly."),
    ] = None,
    no_sweep: Annotated[
        bool, _of_cpu("--no-sweep", help="Don't also time one thread, two and so on.")
    ] = False,
    llama_python: Annotated[
        str | None,
        _of_cpu(
            metavar="PYTHON", help="It has llama-cpp-python; default: the one that runs qtool."
        ),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Measure which kernels are fastest on this card, and use that from now on.",
        ),
    ] = False,
) -> None:
    """Time a checkpoint against its original, in one run, and print sizes and bits.

    [bold]Examples[/bold]

      qtool bench OUT_DIR --baseline MODEL

      qtool bench OUT_DIR --backend reference --json result.json

      qtool bench OUT_DIR --gguf model.Q4_0.gguf --llama-python /path/to/python

      qtool bench OUT_DIR --gpu --peers --plot roofline.svg

      qtool bench --synthetic llama3-8b --bits 2

      qtool bench --tune

      qtool bench --synthetic llama2-70b --bits 3 --gpus 2
    """
    _check_usage(context)
    check_targets([json_file, plot])
    if tune:
        _tune(json_file)
        return
    early.check_backend(backend)
    opened = partial(early.opened, [out_dir, baseline], device, adapter=adapter)
    with progress(NOT_KEPT) as emit, opened(emit=emit) as (where, original):
        from qtool import pipeline

        kernels = quality = None
        if gpu or synthetic is not None:
            scheme = WeightScheme(
                num_bits=bits or DEFAULT_BITS, group_size=group_size or DEFAULT_GROUP_SIZE
            )
            kernels = pipeline.GpuOptions(
                synthetic=synthetic,
                scheme=scheme,
                inputs=ActivationScheme(num_bits=input_bits) if input_bits else None,
                kernel=kernel,
                peers=peers,
                gpus=gpus,
                plot=plot,
                kv_cache=kv_cache,
            )
        elif perplexity_windows:
            quality = pipeline.EvalOptions(max_windows=perplexity_windows)
        beside = pipeline.CpuOptions(gguf_files=tuple(gguf or ()), llama_python=llama_python)
        options = pipeline.BenchOptions(
            backend=backend,
            quality=quality,
            gpu=kernels,
            cpu=None if kernels or no_sweep else beside,
        )
        result = pipeline.bench(where, options, baseline=original, emit=emit)
    report = gpu_report(result.kernels) if result.kernels else speed_report(result)
    if not console.write_json(report, json_file):
        return
    if result.kernels is not None:
        print_gpu_result(result.kernels)
        return
    print_models(result.figures)
    if result.cpu is not None:
        print_cpu_result(result.cpu)
    if len(result.figures) == 1:
        console.out.print(NO_ORIGINAL, markup=False, soft_wrap=True)


def _tune(json_file: Path | None) -> None:
    """Write the tuning table of this card, and show it."""
    with progress(NOT_KEPT) as emit:
        from qtool import pipeline
        from qtool.cli.tables.tuning import print_tuned, tuned_report

        tuned = pipeline.tune_card(emit)
    if console.write_json(tuned_report(tuned), json_file):
        print_tuned(tuned)


def _check_usage(context: typer.Context) -> None:
    """Refuse options that would do nothing together."""
    given = {
        name for name, value in context.params.items() if value not in (None, False, 0, [], ())
    }
    if context.params["gpus"] == 1:
        given.discard("gpus")
    modes = {_option(name) for name in given & {"gpu", "synthetic", "no_sweep"}}
    modes |= {"--gpu"} if "synthetic" in given else set()
    messages = []
    device = context.params["device"]
    if "--gpu" in modes and device == "cpu":
        messages.append("--device cpu doesn't go with --gpu.")
    if "tune" in given:
        others = sorted(given - {"tune", "json_file"}, key=lambda name: name != "out_dir")
        messages += [f"{_option(name)} doesn't go with --tune." for name in others]
    elif not given & {"out_dir", "synthetic"}:
        messages.append("Give OUT_DIR or, for shapes without weights, --synthetic NAME.")
    for name in sorted(given if "tune" not in given else ()):
        option = _option(name)
        for mode in CLASHES:
            if name in NEEDING.get(mode, ()) and mode not in modes:
                messages.append(f"{option} needs {mode}.")
            if name in CLASHES[mode] and mode in modes:
                messages.append(f"{option} doesn't go with {mode}.")
    messages += wrong_plot_name(context.params["plot"])
    if messages:
        raise typer.BadParameter(" ".join(messages), ctx=context)


def _option(name: str) -> str:
    """Return what a user types for a parameter."""
    return "OUT_DIR" if name == "out_dir" else f"--{name.replace('_', '-')}"
