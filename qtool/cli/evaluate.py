"""`qtool eval`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.cli import console, early
from qtool.cli.options import (
    AdapterOption,
    BackendOption,
    DeviceOption,
    DTypeOption,
    JsonOption,
    KvCacheOption,
    check_targets,
    in_panel,
    refuse_ignored,
    torch_dtype,
)
from qtool.cli.progress import progress
from qtool.cli.tables.models import comparison_report, print_comparison
from qtool.cli.tables.tasks import print_tasks, raise_failures, task_report, write_markdown
from qtool.cli.tables.written import show_written
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

if TYPE_CHECKING:
    from qtool.pipeline.task_results import TaskComparison

WITHOUT = "Without --tasks"
_of_perplexity = in_panel(WITHOUT)
WITH_PAIRS = "With --pairs"
_of_pairs = in_panel(WITH_PAIRS)
_of_tasks = in_panel(WITH)


def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Checkpoint, or any model that quantize takes.")],
    tasks: TasksOption = None,
    baseline: Annotated[
        str | None, typer.Option(help="Model to measure beside it, such as the original.")
    ] = None,
    adapter: AdapterOption = None,
    dtype: DTypeOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
    kv_cache: KvCacheOption = None,
    json_file: JsonOption = None,
    markdown: Annotated[
        Path | None, _of_tasks(help="Write the table as Markdown; - is stdout.")
    ] = None,
    dataset: Annotated[
        str, _of_perplexity(help="Bundled text, or the path of a .txt or .jsonl file.")
    ] = "wikitext2-test",
    context_length: Annotated[
        int, _of_perplexity(metavar="N", min=2, help="Tokens per window.")
    ] = 2048,
    windows: Annotated[
        int | None,
        _of_perplexity(metavar="N", min=1, help="Use the first windows only; default all."),
    ] = None,
    no_texts: Annotated[
        bool,
        _of_perplexity("--no-texts", help="Write no texts to compare with those of --baseline."),
    ] = False,
    no_chats: Annotated[
        bool, _of_perplexity("--no-chats", help="Compare on the text only, not on chats as well.")
    ] = False,
    pairs: Annotated[
        Path | None,
        typer.Option(help="JSON lines with prompts: answer them, and compare by BLEU and ROUGE."),
    ] = None,
    answer_tokens: Annotated[
        int, _of_pairs(metavar="N", min=1, help="Of an answer, at most.")
    ] = 128,
    prompts: Annotated[
        int | None, _of_pairs(metavar="N", min=1, help="The first prompts only.")
    ] = None,
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
    """Measure quality: tasks of lm-eval, or perplexity and closeness to the original.

    [bold]Examples[/bold]

      qtool eval OUT_DIR --tasks mmlu,arc_easy --baseline MODEL

      qtool eval OUT_DIR --tasks humaneval --confirm-run-unsafe-code --data-dir DIR

      qtool eval OUT_DIR --baseline MODEL --windows 8 --json result.json

      qtool eval OUT_DIR --adapter ADAPTER_DIR --pairs test.jsonl
    """
    _check_usage(context, with_tasks=tasks is not None, with_pairs=pairs is not None)
    if str(samples) == "-":
        raise typer.BadParameter("--samples takes the name of a file.")
    check_targets([json_file, markdown, samples])
    early.check_backend(backend)
    batch, precision = read_batch_size(batch_size), torch_dtype(dtype)
    early.check_pairs(pairs)
    with progress("Nothing was kept." if tasks is None or no_cache else ANSWERS_KEPT) as emit:
        check_tasks(tasks, data_dir, emit)
        with early.opened([model, baseline], device, emit, adapter) as (where, original):
            if tasks is None and pairs is None:
                early.check_text(dataset)
            from qtool import pipeline

            if pairs is not None:
                models = tuple(one for one in (original, where) if one is not None)
                asked_for = pipeline.PairOptions(
                    file=pairs, max_tokens=answer_tokens, limit=prompts
                )
                written = pipeline.write_pairs(models, asked_for, backend, precision, emit)
                show_written(written, json_file)
                return
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
            asked = asked_tasks(tasks, gen_kwargs, values, emit)
            options = pipeline.EvalOptions(
                tasks=asked,
                dataset=dataset,
                context_length=context_length,
                max_windows=windows,
                texts=not no_texts,
                kv_cache=kv_cache,
                **({"chats": None} if no_chats else {}),
            )
            result = pipeline.evaluate(
                where,
                options,
                baseline=original,
                backend=backend,
                dtype=precision,
                emit=emit,
            )
    if result.tasks is not None:
        _show_tasks(result.tasks, json_file, markdown)
        return
    if console.write_json(comparison_report(result), json_file):
        print_comparison(result)


def _show_tasks(scored: "TaskComparison", json_file: Path | None, markdown: Path | None) -> None:
    is_free = console.write_json(task_report(scored), json_file)
    if write_markdown(scored, markdown) and is_free:
        print_tasks(scored)
    raise_failures(scored)


def _check_usage(context: typer.Context, *, with_tasks: bool, with_pairs: bool) -> None:
    """Raise a usage error for options that would be ignored, as their panel in the help says."""
    if with_tasks and with_pairs:
        raise typer.BadParameter("--pairs goes without --tasks.")
    if with_pairs:
        refuse_ignored(context, {WITHOUT: "goes without --pairs", WITH: NEEDS_TASKS})
    elif with_tasks:
        refuse_ignored(context, {WITHOUT: "goes without --tasks", WITH_PAIRS: "needs --pairs"})
    else:
        refuse_ignored(context, {WITH: NEEDS_TASKS, WITH_PAIRS: "needs --pairs"})
