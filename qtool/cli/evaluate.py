"""`qtool eval`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from qtool.cli import console
from qtool.cli.figures import print_comparison
from qtool.cli.options import BackendOption, JsonOption
from qtool.errors import NotYetError


def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint, or any model that quantize takes.")],
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval tasks, comma-separated (next version).")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Model to measure beside it, such as the original.")
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="Bundled text, or the path of a .txt or .jsonl file.")
    ] = "wikitext2-test",
    context_length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 2048,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Use the first windows only; default all.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Local task data (next version).")] = None,
    limit: Annotated[int | None, typer.Option(help="Items per task (next version).")] = None,
    backend: BackendOption = None,
    json_file: JsonOption = None,
) -> None:
    """Measure the perplexity of a model, beside its original if asked.

    [bold]Examples[/bold]

      qtool eval OUT_DIR --baseline MODEL

      qtool eval OUT_DIR --windows 8 --json result.json
    """
    if tasks is not None or data_dir is not None or limit is not None:
        raise NotYetError(
            "lm-eval tasks come with a later version; without --tasks, --data-dir and --limit "
            "`qtool eval` measures perplexity."
        )
    from qtool import pipeline  # torch: slow

    options = pipeline.EvalOptions(
        dataset=dataset, context_length=context_length, max_windows=windows
    )
    with console.progress() as emit:
        result = pipeline.evaluate(model, options, baseline=baseline, backend=backend, emit=emit)
    console.write_json(asdict(result), json_file)
    if console.wants_table(json_file):
        print_comparison(result)
