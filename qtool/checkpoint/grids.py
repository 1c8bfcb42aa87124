"""The table of a grid, as its folder has it: torch-free."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from qtool.checkpoint.marks import is_checkpoint
from qtool.errors import RecipeError

GRID_NAME = "grid.json"


def with_grids(names: Sequence[str]) -> list[str]:
    """Return models with a grid's folder of one replaced by that and what was made of it.

    Raises:
        RecipeError: the folder is of several models, or nothing was made yet.
    """
    return [found for name in names for found in _of_grid(name)]


def _of_grid(name: str) -> Iterator[str]:
    file = Path(name) / GRID_NAME
    if not file.is_file():
        yield name
        return
    values = json.loads(file.read_bytes())
    made = [str(file.parent / cell["folder"]) for cell in values["cells"]]
    made = [folder for folder in made if is_checkpoint(Path(folder))]
    if "original" not in values or not made:
        what = "has made no checkpoint yet" if "original" in values else "is of several models"
        raise RecipeError(f"The grid {name} {what}. Give the folder of a model in it.")
    yield values["original"]
    yield from made
