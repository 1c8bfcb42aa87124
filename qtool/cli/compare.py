"""`qtool compare`."""

from pathlib import Path
from typing import Annotated

import typer

from qtool.checkpoint.grids import with_grids
from qtool.cli import console, early
from qtool.cli.options import (
    BackendOption,
    DeviceOption,
    DTypeOption,
    JsonOption,
    check_targets,
    in_panel,
    refuse_ignored,
    torch_dtype,
)
from qtool.cli.progress import progress
from qtool.cli.tables.compared import compared_report, print_compared, write_compared
from qtool.cli.task_options import (
    ANSWERS_KEPT,
    NEEDS_TASKS,
    WITH,
    BatchSizeOption,
    ChatTemplateOption,
    ConfirmOption,
    DataDirOption,
    FewShotOption,
    GenerationOption,
    LimitOption,
    MaxLengthOption,
    NoCacheOption,
    SamplesOption,
    SeedOption,
    TasksOption,
    asked_tasks,
    check_tasks,
    read_batch_size,
)
from qtool.errors import QtoolError

_FEWEST = 2
NO_TEXTS = "--no-texts"
_TEXTS = "Texts"
_of_texts = in_panel(_TEXTS)


def compare(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(
            help="Two models or more, the original first: directories, hub ids, .gguf files. Also "
            "what other tools have quantized, if transformers loads it; or GRID/MODEL of `grid`."
        ),
    ],
    tasks: TasksOption = None,
    dtype: DTypeOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
    json_file: JsonOption = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the tables as Markdown; - is stdout.")
    ] = None,
    dataset: Annotated[
        str, _of_texts(help="Bundled text, or the path of a .txt or .jsonl file.")
    ] = "wikitext2-test",
    context_length: Annotated[int, _of_texts(metavar="N", min=2, help="Tokens per window.")] = 2048,
    windows: Annotated[
        int | None, _of_texts(metavar="N", min=1, help="Use the first windows only; default all.")
    ] = None,
    no_chats: Annotated[
        bool, _of_texts("--no-chats", help="Compare on the text only, not on chats as well.")
    ] = False,
    no_texts: Annotated[
        bool, typer.Option(NO_TEXTS, help="Run the tasks only: no perplexity, no KL divergence.")
    ] = False,
    data_dir: DataDirOption = None,
    limit: LimitOption = None,
    num_fewshot: FewShotOption = None,
    batch_size: BatchSizeOption = "auto",
    max_length: MaxLengthOption = None,
    apply_chat_template: ChatTemplateOption = False,
    seed: SeedOption = None,
    samples: SamplesOption = None,
    gen_kwargs: GenerationOption = None,
    confirm_run_unsafe_code: ConfirmOption = False,
    no_cache: NoCacheOption = False,
) -> None:
    """Compare any number of models with the first: texts, KL divergence, tasks.

    [bold]Examples[/bold]

      qtool compare MODEL W4_DIR W3_DIR --windows 8

      qtool compare MODEL W4_DIR OTHER_TOOLS_W4 --tasks arc_easy,gsm8k --markdown table.md
    """
    models = with_grids(models)
    _check_request(context, models, with_tasks=tasks is not None)
    if str(samples) == "-":
        raise typer.BadParameter("--samples takes the name of a file.")
    check_targets([json_file, markdown, samples])
    early.check_backend(backend)
    batch, precision = read_batch_size(batch_size), torch_dtype(dtype)
    with progress("Nothing was kept." if tasks is None or no_cache else ANSWERS_KEPT) as emit:
        check_tasks(tasks, data_dir, emit)
        with early.opened(models, device, emit) as found:
            if not no_texts:
                early.check_text(dataset)
            from qtool import pipeline

            values = {
                "data_dir": data_dir,
                "num_fewshot": num_fewshot,
                "limit": limit,
                "batch_size": batch,
                "max_length": max_length,
                "chat_template": apply_chat_template,
                "seed": seed,
                "confirm_unsafe": confirm_run_unsafe_code,
                "cache": not no_cache,
                "samples": samples,
            }
            texts = pipeline.EvalOptions(
                dataset=dataset,
                context_length=context_length,
                max_windows=windows,
                texts=False,
                **({"chats": None} if no_chats else {}),
            )
            options = pipeline.CompareOptions(
                texts=None if no_texts else texts,
                tasks=asked_tasks(tasks, gen_kwargs, values, emit),
            )
            result = pipeline.compare(found, options, backend=backend, dtype=precision, emit=emit)
    is_free = console.write_json(compared_report(result), json_file)
    if write_compared(result, markdown) and is_free:
        print_compared(result)
    if result.failures():
        raise QtoolError(
            f"Failed: {', '.join(result.failures())}. Why is said with the figures (in JSON: "
            "`failure` and `failures` of each model). The others stand."
        )


def _check_request(context: typer.Context, models: list[str], *, with_tasks: bool) -> None:
    """Raise a usage error for one model alone, and for options that would be ignored."""
    if len(models) < _FEWEST:
        raise typer.BadParameter("Give at least two models, the original first.")
    if context.params.get("no_texts") and not with_tasks:
        raise typer.BadParameter(f"{NO_TEXTS} needs --tasks: nothing is left to measure.")
    if not with_tasks:
        refuse_ignored(context, {WITH: NEEDS_TASKS})
    elif context.params.get("no_texts"):
        refuse_ignored(context, {_TEXTS: f"goes without {NO_TEXTS}"})
