"""`qtool grid`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from qtool.cli import early
from qtool.cli.engine_options import (
    AddressOption,
    EngineOption,
    ThreadsOption,
    WorkersOption,
    engine_options,
)
from qtool.cli.options import GATE_FAILED, DeviceOption, JsonOption, check_targets
from qtool.cli.progress import progress
from qtool.cli.tables.grids import print_grid
from qtool.errors import QtoolError, RecipeError

CELLS_KEPT = "Finished cells are kept: the same command goes on after them."


def grid(
    out_dir: Annotated[Path, typer.Argument(help="Gets MODEL/RECIPE for each, and grid.json.")],
    model: Annotated[
        list[str], typer.Option("--model", help="As for `qtool quantize`; may be repeated.")
    ],
    recipe: Annotated[
        list[str], typer.Option("--recipe", help="As for `qtool run`; may be repeated.")
    ],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key of all recipes: a.b=value.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of local task data: nothing is downloaded.")
    ] = None,
    device: DeviceOption = None,
    engine: EngineOption = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = None,
    address: AddressOption = None,
    json_file: JsonOption = None,
) -> None:
    """Carry out each recipe for each model, shared among workers; a table grows.

    [bold]Examples[/bold]

      qtool grid grid --model A --model B --recipe w4.yaml --recipe w3.yaml --engine local

      qtool compare grid/A --windows 8
    """
    from qtool.recipe.load import load_recipe  # pydantic: a quarter second

    check_targets([json_file])
    shared = engine_options(engine, workers, threads, address)
    recipes = {Path(each).name: load_recipe(each, settings or []) for each in recipe}
    if len({Path(title).stem for title in recipes}) < len(recipe):
        raise RecipeError("Two recipes of one name would share a directory. Rename one.")
    for chosen in recipes.values():
        if chosen.eval is not None and chosen.eval.tasks:
            early.check_spelling(chosen.eval.tasks)
    with progress(CELLS_KEPT) as emit, early.opened(model, device, emit) as found:
        for where in found:
            for chosen in recipes.values():
                early.check_recipe(where, chosen)
        from qtool import pipeline

        options = pipeline.RunOptions(data_dir=data_dir)
        cells = pipeline.grid(found, recipes, out_dir, options, engine=shared, emit=emit)
        show = partial(print_grid, cells, out_dir)
    show(json_file)
    failed = [cell for cell in cells if cell.failure is not None]
    if failed:
        raise QtoolError(
            f"{len(failed)} of {len(cells)} cells failed. The others are kept: the same command "
            "again carries out only these."
        )
    if not all(cell.passed for cell in cells):
        raise typer.Exit(GATE_FAILED)
