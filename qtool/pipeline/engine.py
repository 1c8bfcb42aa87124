"""The workers that a command shares its work among."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from qtool.base import Progress
from qtool.engines import EngineOptions, load_engine
from qtool.recipe.schema import Recipe
from qtool.steps.run import Run
from qtool.steps.solve_apart import check_shareable

CHUNKS = 8
"""Of the samples, where the recipe doesn't say: so many workers can measure at once."""
AHEAD = (
    "qtool.steps.solve_apart",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
)
"""What workers import first."""


PART_ROWS = 1024
"""Likewise of a linear's rows, on a CPU: a card solves more rows in about the same time."""


def divided_for(recipe: Recipe, options: EngineOptions | None, device: str) -> Recipe:
    """Return a recipe whose samples and rows are divided, if workers are to share them."""
    section = recipe.calibration
    if options is None or section is None:
        return recipe
    update: dict[str, int] = {}
    if section.chunks is None:
        update["chunks"] = CHUNKS
    if section.part_rows is None and section.output_groups is None and device == "cpu":
        update["part_rows"] = PART_ROWS
    return recipe.model_copy(update={"calibration": section.model_copy(update=update)})


def check_engine(options: EngineOptions | None, recipe: Recipe) -> None:
    """Refuse workers that there can't be, and work that can't be shared among them.

    Raises:
        EngineError: the engine can't have such workers.
        MissingExtraError: it isn't installed.
        RecipeError: something that the recipe asks for can't be shared.
        UnknownNameError: there is no such engine.
    """
    if options is not None:
        load_engine(options.name).check(options.workers)
        check_shareable(recipe)


@contextmanager
def with_workers(run: Run, options: EngineOptions | None) -> Iterator[Run]:
    """Give a run the workers that are asked for; None: it keeps to this process.

    Raises:
        EngineError: there are no workers to be had.
    """
    if options is None:
        yield run
        return
    engine = load_engine(options.name)
    run.env.emit(Progress("starting workers"))
    workers = replace(options.workers, device=run.env.device, modules=AHEAD)
    with engine.open(workers) as pool:
        yield replace(run, pool=pool)
