"""YAML -> Recipe: strict parse with line numbers, `extends`, `--set`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from qtool.errors import RecipeError
from qtool.plugins import describe_miss
from qtool.recipe.names import find
from qtool.recipe.schema import Recipe

Path_ = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class _Source:
    """A parsed document and where each of its keys came from."""

    values: dict[str, Any]
    places: Mapping[Path_, str]
    """'file.yaml line 7' by path of the key."""


def load_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by built-in name or path.

    Args:
        source: Built-in name, or a path ending in .yaml.
        overrides: Assignments such as 'weights.scheme.num_bits=3'; values are YAML.

    Raises:
        RecipeError: unknown name, broken YAML, unknown key or impossible value.
    """
    document = _read(find(source).resolve(), seen=())
    return _validate(_apply_overrides(document, overrides), label=source)


def recipe_from_mapping(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Build a recipe from plain data, such as the one stored in a checkpoint."""
    document = _Source(dict(values), {})
    return _validate(_apply_overrides(document, overrides), label="the options")


def _read(path: Path, seen: tuple[Path, ...]) -> _Source:
    """Read one file and, below it, the recipe that it extends."""
    if path in seen:
        chain = " -> ".join(str(p) for p in (*seen, path))
        raise RecipeError(f"Recipes extend each other in a circle: {chain}.")
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path} can't be read as UTF-8 text: {error}.") from error
    document = _parse(text, path.name)
    parent = document.values.pop("extends", None)
    if parent is None:
        return document
    if not isinstance(parent, str):
        raise RecipeError(f"{path}: extends is {parent!r}; it takes one recipe name or path.")
    base = _read(find(parent, relative_to=path.parent).resolve(), (*seen, path))
    values = merge(base.values, document.values)
    return _Source(values, {**base.places, **document.places})


def _parse(text: str, name: str) -> _Source:
    """Parse YAML and note the line of each key; repeated keys are errors."""
    places: dict[Path_, str] = {}

    def note(node: yaml.Node, path: Path_) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                place = f"{name} line {key.start_mark.line + 1}"
                here = (*path, str(key.value))  # a key may be a list: safe_load refuses it below
                if here in places:
                    raise RecipeError(f"{dotted(here)} is given twice ({place}).")
                places[here] = place
                note(value, here)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                places[*path, index] = f"{name} line {item.start_mark.line + 1}"
                note(item, (*path, index))

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            note(root, ())
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{name}{where} isn't valid YAML: {problem}.") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{name} must be a mapping with the key 'weights'.")
    return _Source(values, places)


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `top` laid over it; mappings merge, all else replaces."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _apply_overrides(document: _Source, overrides: Iterable[str]) -> _Source:
    values, places = document.values, dict(document.places)
    for text in overrides:
        key, equals, raw = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            raise RecipeError(f"--set {text!r} isn't an assignment. Write --set a.b=value.")
        try:
            value: Any = yaml.safe_load(raw) if raw.strip() else None
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {text!r}: the value isn't valid YAML.") from error
        for part in reversed(path):
            value = {part: value}
        values = merge(values, value)
        places[path] = f"--set {text}"
    return _Source(values, places)


def _validate(document: _Source, label: str) -> Recipe:
    try:
        return Recipe.model_validate(document.values)
    except ValidationError as error:
        raise RecipeError(_sentence(_alternatives(error), document, label)) from None


def _alternatives(error: ValidationError) -> dict[str, Any]:
    """Return the first error, with all messages on the same key: a key may take several types."""
    errors = error.errors(include_url=False)
    if errors[0]["type"] in ("extra_forbidden", "missing"):  # the path ends in the user's own key
        return dict(errors[0])
    path = _keys(errors[0]["loc"])
    same = [other for other in errors if _keys(other["loc"]) == path]
    messages = list(dict.fromkeys(other["msg"].removeprefix("Value error, ") for other in same))
    first, *others = messages
    rest = [message.removeprefix("Input should be ") for message in others]
    return {**errors[0], "loc": path, "msg": " or ".join([first, *rest])}


def _keys(path: Path_) -> Path_:
    """Return a path without the types that pydantic tried: they aren't keys."""
    return tuple(
        part
        for part in path
        if isinstance(part, int) or (part.isidentifier() and part not in ("int", "float"))
    )


def _sentence(error: Mapping[str, Any], document: _Source, label: str) -> str:
    """Return one line: path, value, rule, line, nearest known key."""
    path: Path_ = error["loc"]
    place = next(
        (document.places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in document.places),
        label,
    )
    if error["type"] == "extra_forbidden":
        known = tuple(_fields_at(path[:-1]))
        where = dotted(path[:-1]) or "the recipe"
        return f"{describe_miss(str(path[-1]), known, where)} ({place})"
    if error["type"] == "missing":
        return f"{dotted(path)} is missing ({place})."
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    return f"{dotted(path)} is {error['input']!r}; {message} ({place})."


def _fields_at(path: Path_) -> Iterable[str]:
    """Return the known keys of the section at `path`."""
    model: Any = Recipe
    for part in path:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        arguments = getattr(annotation, "__args__", ()) or (annotation,)
        model = next(a for a in arguments if isinstance(a, type) and issubclass(a, BaseModel))
    return tuple(model.model_fields)


def dotted(path: Path_) -> str:
    """Return a path as users write it: weights.overrides.0.match."""
    return ".".join(str(part) for part in path)
