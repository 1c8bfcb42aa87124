"""The workers that a command shares its work among."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from qtool.base import Emit, Progress
from qtool.engines import Workers, load_engine
from qtool.recipe.schema import Recipe
from qtool.steps.run import Run
from qtool.steps.solve_apart import check_shareable

CHUNKS = 8
"""Of the samples, where the recipe doesn't say: so many workers can measure at once."""
AHEAD = ("qtool.steps.solve_apart", "transformers.models.auto.modeling_auto")
"""What workers import first."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Which engine, and how many workers it has."""

    name: str
    """Of the engine."""
    workers: int | None = None
    """None: one per card, or per core without one."""
    threads: int = 1
    """Of each worker on a CPU; another number gives another result, in its last bits."""
    address: str | None = None
    """Of a cluster; None: this machine."""


def in_chunks(recipe: Recipe) -> Recipe:
    """Return a recipe whose samples are summed in chunks, so that workers can share them."""
    section = recipe.calibration
    if section is None or section.chunks is not None:
        return recipe
    return recipe.model_copy(
        update={"calibration": section.model_copy(update={"chunks": CHUNKS})}
    )


@contextmanager
def with_workers(run: Run, options: EngineOptions | None, emit: Emit) -> Iterator[Run]:
    """Give a run the workers that are asked for; None: it keeps to this process.

    Raises:
        RecipeError: something that the recipe asks for can't be shared.
        EngineError: there are no workers to be had.
        MissingExtraError: the engine isn't installed.
        UnknownNameError: there is no such engine.
    """
    if options is None:
        yield run
        return
    check_shareable(run)
    engine = load_engine(options.name)
    emit(Progress("starting workers"))
    workers = Workers(
        count=options.workers,
        threads=options.threads,
        device=run.env.device,
        address=options.address,
        modules=AHEAD,
    )
    with engine.open(workers) as pool:
        yield replace(run, pool=pool)
