"""Many recipes for many models: each pair is a cell, carried out by whichever worker is free.

A cell is a run as `qtool run` does it, in a directory of its own; so what is finished is kept, and
the same command goes on with the rest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qtool.base import Emit, Notice, Progress, ignore_events
from qtool.checkpoint.grids import GRID_NAME
from qtool.checkpoint.marks import is_checkpoint
from qtool.engines import EngineOptions, Task, load_engine
from qtool.errors import OutputError, QtoolError, RecipeError
from qtool.modeling.device import default_device, free_memory, use_device
from qtool.modeling.locate import Location
from qtool.pipeline.run import RunOptions, check_measurable, run_recipe
from qtool.recipe.schema import Recipe
from qtool.storage.plain_json import plain_json, write_json_file

IN_THIS_PROCESS = EngineOptions("local")


@dataclass(frozen=True, slots=True)
class GridCell:
    """One recipe for one model: the argument of `run_cell`."""

    model: Location
    title: str
    """Of the recipe."""
    recipe: Recipe
    out_dir: Path
    options: RunOptions
    device: str

    @property
    def name(self) -> str:
        """Model and recipe."""
        return f"{self.model.name}, {self.title}"


@dataclass(frozen=True, slots=True)
class CellResult:
    """What became of a cell."""

    model: str
    recipe: str
    folder: str
    """Of the checkpoint, in that of the model."""
    passed: bool
    """Whether it came to its end, and no gate has failed."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """All that was measured, as gates read it."""
    failure: str | None = None
    """Why there is no result, or not all of it."""


def run_cell(cell: GridCell) -> CellResult:
    """Carry out a cell; what fails in it is a part of what is returned."""
    found = CellResult(cell.model.name, cell.title, cell.out_dir.name, passed=False)
    try:
        with use_device(cell.device):
            result = run_recipe(
                cell.model, cell.out_dir, cell.recipe, cell.options, title=cell.title
            )
    except QtoolError as error:
        return replace(found, failure=str(error))
    finally:
        free_memory()
    return replace(
        found,
        passed=result.passed and not result.failures,
        figures=plain_json(result.figures),
        failure="; ".join(result.failures) or None,
    )


def grid(
    models: Sequence[Location],
    recipes: Mapping[str, Recipe],
    out_dir: Path,
    options: RunOptions,
    *,
    engine: EngineOptions | None = None,
    emit: Emit = ignore_events,
) -> tuple[CellResult, ...]:
    """Carry out all recipes for all models, and keep a table of what is done so far.

    Results are `out_dir`/MODEL/RECIPE, the table `out_dir`/grid.json; each model's folder has the
    part that is its own, which `qtool compare` reads.

    Args:
        models: Originals, of different names.
        recipes: By their titles.
        out_dir: Gets a directory for each model.
        options: For every cell; its engine must be None, for a cell is one worker's.
        engine: Workers that cells are shared among; None: this process does one after the other.
        emit: Is told of each cell that is done.

    Raises:
        RecipeError: two models or recipes would share a directory.
        OutputError: `out_dir` is a checkpoint.
        QtoolError: what a recipe measures can't be measured here; or as `Pool.map`.
    """
    cells = _cells(models, recipes, out_dir, options)
    for recipe in recipes.values():
        check_measurable(recipe, options)
    chosen = engine or replace(IN_THIS_PROCESS, workers=replace(IN_THIS_PROCESS.workers, count=1))
    workers = replace(chosen.workers, device=str(default_device()), modules=(__name__,))
    opened = load_engine(chosen.name)
    opened.check(workers)
    emit(Progress("starting workers"))
    done: list[CellResult] = []
    with opened.open(workers) as pool:
        for found in pool.map(run_cell, [Task(cell.name, cell) for cell in cells]):
            done.append(found)
            _tell(found, emit, len(done), len(cells))
            _write(out_dir, models, done, len(cells))
    return tuple(done)


def _cells(
    models: Sequence[Location], recipes: Mapping[str, Recipe], out_dir: Path, options: RunOptions
) -> list[GridCell]:
    """Return all cells, each model's together."""
    if is_checkpoint(out_dir):
        raise OutputError(
            f"{out_dir} is a checkpoint, and a grid writes a directory of them. Give another one."
        )
    folders = [_folder(model) for model in models]
    if len(set(folders)) < len(folders):
        raise RecipeError(f"Two models would share a directory: {', '.join(folders)}. Rename one.")
    device = str(default_device())
    return [
        GridCell(model, title, recipe, out_dir / _folder(model) / Path(title).stem, options, device)
        for model in models
        for title, recipe in recipes.items()
    ]


def _folder(model: Location) -> str:
    return model.name.rstrip("/").rpartition("/")[2].replace(":", "-")


def _tell(found: CellResult, emit: Emit, number: int, total: int) -> None:
    if found.failure is not None:
        emit(Notice(f"{found.model}, {found.recipe}: {found.failure}"))
    emit(Progress("grid", number, total, f"{found.model}, {found.recipe}"))


def _write(
    out_dir: Path, models: Sequence[Location], done: Sequence[CellResult], total: int
) -> None:
    """Write the table so far, and each model's own."""
    out_dir.mkdir(parents=True, exist_ok=True)
    cells = [asdict(each) for each in done]
    write_json_file(out_dir / GRID_NAME, {"cells": cells, "num_cells": total})
    for model in models:
        own = [cell for cell in cells if cell["model"] == model.name]
        folder = out_dir / _folder(model)
        if own and folder.is_dir():
            original = model.name if model.path is None else str(model.directory)
            write_json_file(folder / GRID_NAME, {"original": original, "cells": own})
