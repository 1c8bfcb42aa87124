"""YAML -> Recipe: strict parse with line numbers, `extends`, `--set`."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from qtool.errors import RecipeError
from qtool.plugins import describe_miss
from qtool.recipe.document import MOST_DEPTH, Keys, PlacedValues, dotted, parse_value, read_document
from qtool.recipe.gates import gate_problems
from qtool.recipe.names import find_recipe
from qtool.recipe.schema import Recipe
from qtool.storage.plain_json import JsonValue
from qtool.wording import quoted

LONGEST_CHAIN = 16
"""Recipes that extend each other: more is a mistake."""
NAMES_A_PLUGIN = ("method", "name")
"""Keys beside which `options` are those of what they name."""


def load_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by built-in name or path.

    Args:
        source: Built-in name, or a path ending in .yaml.
        overrides: Assignments such as 'weights.scheme.num_bits=3'; values are YAML.

    Raises:
        RecipeError: unknown name, broken YAML, unknown key or impossible value.
    """
    document = _read(Path(os.path.realpath(find_recipe(source))), seen=())
    return _validate(_apply_overrides(document, overrides), label=source)


def recipe_from_mapping(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Build a recipe from plain data, such as the one stored in a checkpoint."""
    document = PlacedValues(dict(values), {})
    return _validate(_apply_overrides(document, overrides), label="the options")


def _read(path: Path, seen: tuple[Path, ...]) -> PlacedValues:
    """Read one file and, below it, the recipe that it extends."""
    if path in seen:
        chain = " -> ".join(str(p) for p in (*seen, path))
        raise RecipeError(f"Recipes extend each other in a circle: {chain}.")
    document = read_document(path)
    parent = document.values.pop("extends", None)
    if parent is None:
        return document
    place = document.places["extends",]
    if not isinstance(parent, str):
        raise RecipeError(
            f"extends is {quoted(parent)}; it takes one recipe name or path ({place})."
        )
    if len(seen) == LONGEST_CHAIN:
        raise RecipeError(f"More than {LONGEST_CHAIN} recipes extend each other ({place}).")
    try:
        found = Path(os.path.realpath(find_recipe(parent, relative_to=path.parent)))
    except RecipeError as error:
        raise RecipeError(f"extends: {error} ({place})") from None
    base = _read(found, (*seen, path))
    values = merge(base.values, document.values)
    kept = {keys: at for keys, at in base.places.items() if _is_same(keys, base.values, values)}
    return PlacedValues(values, {**kept, **document.places})


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `top` laid over it; mappings merge, all else replaces.

    Where `top` names another method or fold, options of the old one go, and the methods to choose
    from: they mean nothing to it.
    """
    other = any(key in base and key in top and top[key] != base[key] for key in NAMES_A_PLUGIN)
    merged = _without_options(base) if other else dict(base)
    for key, value in top.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _without_options(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section without what is for its method, options of its overrides included."""
    kept = {key: value for key, value in section.items() if key != "options"}
    if isinstance(choose := kept.get("choose"), Mapping):
        kept["choose"] = {key: value for key, value in choose.items() if key != "method"}
    overrides = kept.get("overrides")
    if isinstance(overrides, (list, tuple)):
        kept["overrides"] = [
            {key: value for key, value in one.items() if key != "options"}
            if isinstance(one, Mapping) and one.get("method") is None
            else one
            for one in overrides
        ]
    return kept


def _is_same(keys: Keys, before: JsonValue, after: JsonValue) -> bool:
    """Return whether keys lead to a value that a merge left alone, at least in part."""
    for key in keys:
        try:
            before, after = before[key], after[key]
        except (KeyError, IndexError, TypeError):
            return False
        if isinstance(before, list) and before is not after:
            return False
    return True


def _apply_overrides(document: PlacedValues, overrides: Iterable[str]) -> PlacedValues:
    """Lay assignments over a document, those of a name first: it drops the old one's options."""
    values, places = document.values, dict(document.places)
    assignments = [_assignment(text) for text in overrides]
    for path, value, place in sorted(assignments, key=lambda one: not _names_a_plugin(one[0])):
        values = _assigned(values, path, value, place)
        places[tuple(int(part) if part.isdecimal() else part for part in path)] = place
    return PlacedValues(values, places)


def _names_a_plugin(path: tuple[str, ...]) -> bool:
    return path[-1] in NAMES_A_PLUGIN and path[-2:-1] != ("choose",)  # those are to choose from


def _assignment(text: str) -> tuple[tuple[str, ...], Any, str]:
    """Return path, value and place of one --set."""
    key, equals, raw = text.partition("=")
    path, shown = tuple(key.strip().split(".")), quoted(text)
    if not equals or not all(path):
        raise RecipeError(f"--set {shown} isn't an assignment. Write --set a.b=value.")
    if len(path) > MOST_DEPTH:
        raise RecipeError(f"--set {shown}: the key has more than {MOST_DEPTH} parts.")
    return path, parse_value(raw, f"--set {shown}: the value"), f"--set {shown[1:-1]}"


def _assigned(values: JsonValue, path: tuple[str, ...], value: JsonValue, place: str) -> JsonValue:
    """Return `values` with another value at `path`; a number is an index of a list."""
    if not path:
        both = isinstance(values, Mapping) and isinstance(value, Mapping)
        return merge(values, value) if both else value
    key, *rest = path
    if isinstance(values, (list, tuple)):
        if not key.isdecimal() or len(key) > len(str(MOST_DEPTH)) or int(key) >= len(values):
            raise RecipeError(f"{key!r} is no index of a list of {len(values)} ({place}).")
        changed = list(values)
        changed[int(key)] = _assigned(values[int(key)], tuple(rest), value, place)
        return changed
    if key.isdecimal():
        raise RecipeError(f"{key!r} is no key, and there is no list to count in ({place}).")
    base = values if isinstance(values, Mapping) else {}
    if not rest:
        return merge(base, {key: value})
    return {**base, key: _assigned(base.get(key), tuple(rest), value, place)}


def _validate(document: PlacedValues, label: str) -> Recipe:
    try:
        recipe = Recipe.model_validate(document.values)
    except ValidationError as error:
        first = _alternatives(error)
        raise RecipeError(_sentence(first, document, label), key=dotted(first["loc"])) from None
    for path, problem in gate_problems(recipe):
        raise RecipeError(f"{problem} ({_place(path, document, label)}).", key=dotted(path))
    return recipe


def _place(path: Keys, document: PlacedValues, label: str) -> str:
    """Return where the value at a path comes from, or what holds it."""
    known = (path[:length] for length in range(len(path), 0, -1))
    return next((document.places[keys] for keys in known if keys in document.places), label)


def _alternatives(error: ValidationError) -> dict[str, Any]:
    """Return the first error, with all messages on the same key: a key may take several types."""
    errors = error.errors(include_url=False)
    errors.sort(key=lambda one: one["type"] != "extra_forbidden")  # a typo explains what is missing
    if errors[0]["type"] in ("extra_forbidden", "missing"):  # the path ends in the user's own key
        return dict(errors[0])
    path = _keys(errors[0]["loc"])
    same = [other for other in errors if _keys(other["loc"]) == path]
    messages = list(dict.fromkeys(other["msg"].removeprefix("Value error, ") for other in same))
    first, *others = messages
    rest = [message.removeprefix("Input should be ") for message in others]
    return {**errors[0], "loc": path, "msg": " or ".join([first, *rest])}


def _keys(path: Keys) -> Keys:
    """Return a path without the types that pydantic tried: they aren't keys."""
    return tuple(
        part
        for part in path
        if isinstance(part, int) or (part.isidentifier() and part not in ("int", "float"))
    )


def _sentence(error: Mapping[str, Any], document: PlacedValues, label: str) -> str:
    """Return one line: path, value, rule, line, nearest known key."""
    path: Keys = error["loc"]
    place = _place(path, document, label)
    if error["type"] == "extra_forbidden":
        known = tuple(_fields_at(path[:-1]))
        if len(path) == 1 and path != ("extends",):  # gone by now, but a key that a file may have
            known = (*known, "extends")
        where = dotted(path[:-1]) or "the recipe"
        return f"{describe_miss(str(path[-1]), known, where)} ({place})"
    if error["type"] == "missing":
        return f"{dotted(path)} is missing ({place})."
    if not path:  # several sections don't fit; the rule names their keys
        return f"{rule(error)} ({place})."
    return f"{dotted(path)} is {quoted(error['input'])}; {rule(error)} ({place})."


def rule(error: Mapping[str, Any]) -> str:
    """Return what pydantic's error says of a value, to follow after the value itself."""
    return re.sub(r"^\w+ should", "it should", error["msg"].removeprefix("Value error, "))


def _fields_at(path: Keys) -> Iterable[str]:
    """Return the known keys of the section at `path`."""
    model: Any = Recipe
    for part in path:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        arguments = getattr(annotation, "__args__", ()) or (annotation,)
        model = next(a for a in arguments if isinstance(a, type) and issubclass(a, BaseModel))
    return tuple(field.alias or name for name, field in model.model_fields.items())
