"""`qtool bench`."""

from dataclasses import asdict
from typing import Annotated

import typer

from qtool.cli import console
from qtool.cli.figures import print_comparison
from qtool.cli.options import BackendOption, JsonOption
from qtool.errors import NotYetError


def bench(
    out_dir: Annotated[str, typer.Argument(help="Checkpoint.")],
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Time the GPU kernels (later version).")
    ] = False,
    baseline: Annotated[
        str | None,
        typer.Option(help="Original to time beside it; default: the checkpoint's source."),
    ] = None,
    perplexity_windows: Annotated[
        int, typer.Option(min=0, help="Also measure perplexity on this many windows.")
    ] = 0,
    backend: BackendOption = None,
    json_file: JsonOption = None,
) -> None:
    """Time a checkpoint against its original, in one run, and print sizes and bits.

    [bold]Examples[/bold]

      qtool bench OUT_DIR --baseline MODEL

      qtool bench OUT_DIR --backend reference --json result.json
    """
    if gpu:
        raise NotYetError(
            "The GPU kernels come with a later version; without --gpu, `qtool bench` times the "
            "model through torch."
        )
    from qtool import pipeline  # torch: slow

    quality = None
    if perplexity_windows:
        quality = pipeline.EvalOptions(max_windows=perplexity_windows)
    with console.progress() as emit:
        result = pipeline.bench(
            out_dir, baseline=baseline, backend=backend, quality=quality, emit=emit
        )
    console.write_json(asdict(result), json_file)
    if console.wants_table(json_file):
        print_comparison(result)
