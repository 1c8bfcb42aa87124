"""The built-in recipes and where a recipe given by name or path is."""

from pathlib import Path

from qtool import resources
from qtool.errors import DataError, RecipeError
from qtool.plugins import describe_miss
from qtool.storage.jsonl import check_file


def built_in() -> tuple[str, ...]:
    """Return the sorted names of the built-in recipes."""
    return tuple(sorted(path.stem for path in resources.recipes_dir().glob("*.yaml")))


def in_folders() -> tuple[str, ...]:
    """Return the sorted names of those in folders, such as `ci/smoke`, which `qtool run` is for."""
    root = resources.recipes_dir()
    found = (path.relative_to(root).with_suffix("") for path in root.glob("*/*.yaml"))
    return tuple(sorted(name.as_posix() for name in found))


def find_recipe(name: str, *, relative_to: Path | None = None) -> Path:
    """Return the file of a recipe.

    Args:
        name: A built-in name, or a path ending in .yaml or .yml.
        relative_to: Folder that relative paths start from; None: the working directory.

    Raises:
        RecipeError: there is no such recipe.
    """
    if name.endswith((".yaml", ".yml")):
        path = (relative_to or Path()) / name
        try:
            check_file(path)
        except DataError as error:
            raise RecipeError(str(error).replace("No file", "No recipe file"), file=path) from None
        return path
    known = in_folders() if "/" in name else built_in()
    if name not in known:
        raise RecipeError(
            describe_miss(name, known, "built-in recipes")
            + " A recipe of your own is given by its path, ending in .yaml."
        )
    return resources.recipes_dir() / f"{name}.yaml"
