"""`qtool grid`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.cli import early
from qtool.cli.engine_options import (
    AddressOption,
    EngineOption,
    ThreadsOption,
    WorkersOption,
    engine_options,
)
from qtool.cli.options import (
    GATE_FAILED,
    DeviceOption,
    JsonOption,
    check_targets,
    in_panel,
    refuse_ignored,
)
from qtool.cli.progress import progress
from qtool.cli.tables.grids import print_grid
from qtool.cli.task_options import (
    WITH,
    ChatTemplateOption,
    ConfirmOption,
    FewShotOption,
    LimitOption,
    TasksOption,
    asked_tasks,
    check_tasks,
)
from qtool.errors import QtoolError, RecipeError

if TYPE_CHECKING:
    from qtool.pipeline import EvalOptions

WITH_DATASET = "With --dataset"
_of_text = in_panel(WITH_DATASET)
CELLS_KEPT = "Finished cells are kept: the same command goes on after them."


def grid(
    context: typer.Context,
    out_dir: Annotated[Path, typer.Argument(help="Gets MODEL/RECIPE for each, and grid.json.")],
    model: Annotated[
        list[str], typer.Option("--model", help="As for `qtool quantize`; may be repeated.")
    ],
    recipe: Annotated[
        list[str] | None, typer.Option("--recipe", help="As for `qtool run`; may be repeated.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key of all recipes: a.b=value.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of local task data: nothing is downloaded.")
    ] = None,
    tasks: TasksOption = None,
    limit: LimitOption = None,
    num_fewshot: FewShotOption = None,
    apply_chat_template: ChatTemplateOption = False,
    confirm_run_unsafe_code: ConfirmOption = False,
    dataset: Annotated[
        str | None,
        typer.Option(help="Measure perplexity: a bundled text, or a .txt or .jsonl file."),
    ] = None,
    context_length: Annotated[int, _of_text(metavar="N", min=2, help="Tokens per window.")] = 2048,
    windows: Annotated[
        int | None, _of_text(metavar="N", min=1, help="Use the first windows only; default all.")
    ] = None,
    device: DeviceOption = None,
    engine: EngineOption = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = None,
    address: AddressOption = None,
    json_file: JsonOption = None,
) -> None:
    """Recipes x models, and tasks x these and what was made of them, shared among workers.

    [bold]Examples[/bold]

      qtool grid grid --model A --model B --recipe w4.yaml --recipe w3.yaml --engine local

      qtool grid grid --model A --model B --tasks arc_easy,gsm8k --engine local

      qtool compare grid/A --windows 8
    """
    from qtool.recipe.load import load_recipe  # pydantic: a quarter second

    _check_wanted(context)
    check_targets([json_file])
    shared = engine_options(engine, workers, threads, address)
    recipes = {Path(each).name: load_recipe(each, settings or []) for each in recipe or []}
    if len({Path(title).stem for title in recipes}) < len(recipe or []):
        raise RecipeError("Two recipes of one name would share a directory. Rename one.")
    for chosen in recipes.values():
        if chosen.eval is not None and chosen.eval.tasks:
            early.check_spelling(chosen.eval.tasks)
    with progress(CELLS_KEPT) as emit, early.opened(model, device, emit) as found:
        for where in found:
            for chosen in recipes.values():
                early.check_recipe(where, chosen)
        check_tasks(tasks, data_dir, emit)
        if dataset is not None:
            early.check_text(dataset)
        from qtool import pipeline

        values = {
            "data_dir": data_dir,
            "num_fewshot": num_fewshot,
            "limit": limit,
            "chat_template": apply_chat_template,
            "confirm_unsafe": confirm_run_unsafe_code,
        }
        text = None if dataset is None else _text(dataset, context_length, windows)
        scores = pipeline.GridScores(tasks=asked_tasks(tasks, None, values, emit), text=text)
        options = pipeline.RunOptions(data_dir=data_dir, engine=shared)
        done = pipeline.grid(found, recipes, out_dir, options, scores=scores, emit=emit)
    print_grid(done, out_dir, json_file)
    failures = done.failures()
    if failures:
        raise QtoolError(
            f"{len(failures)} of {len(done.cells) + len(done.scores)} cells failed. The others "
            "are kept: the same command again carries out only these."
        )
    if not all(cell.passed for cell in done.cells):
        raise typer.Exit(GATE_FAILED)


def _text(dataset: str, context_length: int, windows: int | None) -> "EvalOptions":
    from qtool import pipeline

    return pipeline.EvalOptions(
        dataset=dataset,
        context_length=context_length,
        max_windows=windows,
        texts=False,
        chats=None,
    )


def _check_wanted(context: typer.Context) -> None:
    """Raise a usage error where nothing is asked for, and for options that would be ignored."""
    given = context.params
    if not (given["recipe"] or given["tasks"] or given["dataset"]):
        raise typer.BadParameter("Give --recipe, --tasks or --dataset: nothing is asked for.")
    needed = {WITH: "tasks", WITH_DATASET: "dataset"}
    refuse_ignored(
        context, {panel: f"needs --{one}" for panel, one in needed.items() if not given[one]}
    )
