"""Many recipes for many models: each pair is a cell, carried out by whichever worker is free.

A cell is a run as `qtool run` does it, in a directory of its own; so what is finished is kept, and
the same command goes on with the rest. Then tasks x all of these models, see `grid_scores`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from qtool.base import Emit, Notice, Progress, ignore_events
from qtool.checkpoint.apart import check_apart
from qtool.checkpoint.grids import GRID_NAME
from qtool.checkpoint.many_results import check_collection, check_table, held
from qtool.checkpoint.marks import is_checkpoint
from qtool.engines import EngineOptions, Pool, Task, Workers, load_engine
from qtool.errors import QtoolError, RecipeError
from qtool.modeling.device import default_device, free_memory, use_device
from qtool.modeling.locate import Location
from qtool.pipeline.grid_scores import (
    SCORES_FOLDER,
    GridScores,
    ScoreResult,
    run_score,
    score_cells,
)
from qtool.pipeline.run import RunOptions, check_measurable, run_recipe
from qtool.recipe.schema import Recipe
from qtool.storage.plain_json import plain_json, write_json_file

IN_THIS_PROCESS = EngineOptions("local", Workers(count=1))
NO_SCORES = GridScores()


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

    @property
    def name(self) -> str:
        """Model and recipe."""
        return f"{self.model}, {self.recipe}"


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


@dataclass(frozen=True, slots=True)
class GridResult:
    """All cells of a grid."""

    cells: Sequence[CellResult]
    scores: Sequence[ScoreResult] = ()

    def failures(self) -> list[str]:
        """Return a sentence for each cell that gave no result."""
        found: tuple[CellResult | ScoreResult, ...] = (*self.cells, *self.scores)
        return [f"{one.name}: {one.failure}" for one in found if one.failure is not None]


def grid(
    models: Sequence[Location],
    recipes: Mapping[str, Recipe],
    out_dir: Path,
    options: RunOptions,
    *,
    scores: GridScores = NO_SCORES,
    emit: Emit = ignore_events,
) -> GridResult:
    """Carry out all recipes for all models, and keep a table of what is done so far.

    Results are `out_dir`/MODEL/RECIPE, the table `out_dir`/grid.json; each model's folder has the
    part that is its own, which `qtool compare` reads.

    Args:
        models: Originals, of different names.
        recipes: By their titles.
        out_dir: Gets a directory for each model.
        options: For every cell. Its engine shares cells among workers, each cell being one
            worker's; None: this process does one after the other.
        scores: What is measured of the models, and of what was made of them.
        emit: Is told of each cell that is done.

    Raises:
        RecipeError: two models or recipes would share a directory.
        OutputError: `out_dir` is a checkpoint, has other files of the tables' names, can't be
            written, is in a model, or another grid writes there.
        QtoolError: what is to be measured can't be measured here; or as `Pool.map`.
    """
    for recipe in recipes.values():
        check_measurable(recipe, options)
    scores.check()
    chosen = options.engine or IN_THIS_PROCESS
    workers = replace(chosen.workers, device=str(default_device()), modules=(__name__,))
    opened = load_engine(chosen.name)
    opened.check(workers)
    cells = _cells(models, recipes, out_dir, replace(options, engine=None))
    table = _Table(out_dir, models, len(cells), emit)
    with held(out_dir):
        emit(Progress("starting workers"))
        with opened.open(workers) as pool:
            return _filled(table, pool, cells, scores)


def _filled(
    table: "_Table", pool: Pool, cells: Sequence[GridCell], scores: GridScores
) -> GridResult:
    """Carry out all cells, and then the scores of what they have made."""
    made: list[tuple[str, str, Path]] = []
    tasks = [Task(cell.name, cell) for cell in cells]
    for cell, found in zip(cells, pool.map(run_cell, tasks), strict=True):
        table.add(found)
        if is_checkpoint(cell.out_dir):
            made.append((_folder(cell.model), cell.title, cell.out_dir))
    models = {_folder(model): model for model in table.models}
    wanted = score_cells(scores, models, made, table.out_dir)
    table.num_cells += len(wanted)
    for result in pool.map(run_score, [Task(one.name, one) for one in wanted]):
        table.add(result)
    return GridResult(tuple(table.cells), tuple(table.scores))


def _cells(
    models: Sequence[Location], recipes: Mapping[str, Recipe], out_dir: Path, options: RunOptions
) -> list[GridCell]:
    """Return all cells, each model's together."""
    check_collection(out_dir, "a grid")
    folders = [_folder(model) for model in models]
    if len(set(folders)) < len(folders):
        raise RecipeError(f"Two models would share a directory: {', '.join(folders)}. Rename one.")
    if any(Path(title).stem == SCORES_FOLDER for title in recipes):
        raise RecipeError(
            f"A grid has a folder {SCORES_FOLDER} of its own. Give that recipe another name."
        )
    for place in (out_dir, *(out_dir / folder for folder in folders)):
        check_table(place / GRID_NAME, ("cells",))
    for folder, model in product(folders, models):
        check_apart(out_dir / folder, model.directory)
    device = str(default_device())
    return [
        GridCell(model, title, recipe, out_dir / _folder(model) / Path(title).stem, options, device)
        for model in models
        for title, recipe in recipes.items()
    ]


def _folder(model: Location) -> str:
    return model.name.rstrip("/").rpartition("/")[2].replace(":", "-")


@dataclass(slots=True)
class _Table:
    """What is done so far, as the files have it."""

    out_dir: Path
    models: Sequence[Location]
    num_cells: int
    emit: Emit
    cells: list[CellResult] = field(default_factory=list)
    scores: list[ScoreResult] = field(default_factory=list)

    def add(self, found: CellResult | ScoreResult) -> None:
        """Tell of a cell, and write the table so far and each model's own."""
        if isinstance(found, ScoreResult):
            self.scores.append(found)
        else:
            self.cells.append(found)
        if found.failure is not None:
            self.emit(Notice(f"{found.name}: {found.failure}"))
        self.emit(Progress("grid", len(self.cells) + len(self.scores), self.num_cells, found.name))
        self.write()

    def write(self) -> None:
        self.out_dir.mkdir(parents=True, exist_ok=True)
        kept = {
            "cells": [asdict(one) for one in self.cells],
            "scores": [plain_json(asdict(one)) for one in self.scores],
        }
        write_json_file(self.out_dir / GRID_NAME, {**kept, "num_cells": self.num_cells})
        for model in self.models:
            own = {
                name: [one for one in rows if one["model"] == model.name]
                for name, rows in kept.items()
            }
            folder = self.out_dir / _folder(model)
            if any(own.values()) and folder.is_dir():
                original = model.name if model.path is None else str(model.directory)
                write_json_file(folder / GRID_NAME, {"original": original, **own})
