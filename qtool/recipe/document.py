"""The text of a recipe -> plain data and the line of each key; bounded in time, depth and size.

A recipe may come from a stranger, and YAML is a language: aliases that double with every line,
tags that construct, dates that don't exist. Here a document is composed under a budget, aliases
are counted as often as they are used, and a scalar is null, a boolean, a number or text.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qtool.errors import DataError, RecipeError
from qtool.storage.jsonl import mended, read_text
from qtool.storage.plain_json import JsonValue
from qtool.wording import quoted, reason

MOST_BYTES = 1 << 18
MOST_NODES = 10_000
MOST_DEPTH = 50
MOST_NUMBER = 100
"""Characters of a number; YAML has bases and sexagesimals in which few make a huge one."""

Keys = tuple[str | int, ...]
"""The way from the root of a document to a value."""
PlaceOf = Callable[[int], str]
"""From the number of a line to words for it."""
CORE = "tag:yaml.org,2002:"
TEXT, MERGE, YAML_INT = f"{CORE}str", f"{CORE}merge", f"{CORE}int"
UNLIKE_IT_LOOKS = re.compile(r"[-+]?0[0-7_]*[1-7]|.*:")
"""Octal, as 010, and sexagesimal, as 1:30: few know that YAML 1.1 reads them so."""
SCALARS = {f"{CORE}{kind}" for kind in ("null", "bool", "int", "float", "str")}


@dataclass(frozen=True, slots=True)
class PlacedValues:
    """Plain data and where each of its keys came from."""

    values: dict[str, Any]
    places: Mapping[Keys, str]
    """'file.yaml line 7' by path of the key."""


class _Loader(yaml.SafeLoader):
    """Composes within the budget; nothing but text, numbers, booleans and null has a meaning."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: JsonValue) -> yaml.Node | None:
        self.depth += 1
        self.nodes += 1
        _check_budget(self.depth, self.nodes)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag in SCALARS | {MERGE}]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_document(path: Path) -> PlacedValues:
    """Return what a file holds.

    Raises:
        RecipeError: it can't be read, is too large, isn't YAML, or isn't a mapping.
    """
    try:
        text = read_text(path, most_bytes=MOST_BYTES)
    except DataError as error:
        raise RecipeError(str(error), file=path) from error
    places: dict[Keys, str] = {}
    values = _parse(text, lambda line: f"{path.name} line {line}", places)
    if not isinstance(values, dict):
        raise RecipeError(f"{path.name} must be a mapping with the key 'weights'.")
    return PlacedValues(values, places)


def parse_value(text: str, name: str) -> JsonValue:
    """Return one value written as YAML; an empty text is None.

    Raises:
        RecipeError: it isn't YAML, or too large.
    """
    if len(text) > MOST_BYTES:
        raise RecipeError(f"{name} has more than {MOST_BYTES} characters.")
    return _parse(text, lambda _line: name, {})


def _parse(text: str, place: PlaceOf, places: dict[Keys, str]) -> JsonValue:
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        return None if root is None else _Builder(loader, place, places).value(root, ())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or reason(error)
        where = place(mark.line + 1 if mark else 1)
        raise RecipeError(f"{where} isn't valid YAML: {problem}.") from error


def _check_budget(depth: int, nodes: int) -> None:
    if depth > MOST_DEPTH:
        raise yaml.YAMLError(f"it is nested more than {MOST_DEPTH} deep")
    if nodes > MOST_NODES:
        raise yaml.YAMLError(f"it has more than {MOST_NODES} values, those of aliases included")


class _Builder:
    """Makes plain data of composed nodes; an alias is a node that is met again."""

    def __init__(self, loader: _Loader, place: PlaceOf, places: dict[Keys, str]) -> None:
        self.loader, self.place, self.places, self.nodes = loader, place, places, 0

    def value(self, node: yaml.Node, path: Keys, depth: int = 1) -> JsonValue:
        """Return the value of a node and note the places of the keys in it."""
        self.nodes += 1
        _check_budget(depth, self.nodes)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if node.tag not in (f"{CORE}map", f"{CORE}seq"):
            raise self._error(node, f"the tag {quoted(node.tag)} has no meaning in a recipe")
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                self.places[*path, index] = self._place(item)
                items.append(self.value(item, (*path, index), depth + 1))
            return items
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key, item in node.value:
            if key.tag == MERGE:
                for other in reversed(list(self._mappings(item))):
                    merged |= self.value(other, path, depth + 1)
                continue
            here = (*path, self._key(key))
            if here[-1] in own:
                raise RecipeError(f"{dotted(here)} is given twice ({self._place(key)}).")
            self.places[here] = self._place(key)
            own[str(here[-1])] = self.value(item, here, depth + 1)
        return merged | own

    def _mappings(self, node: yaml.Node) -> Iterator[yaml.Node]:
        for one in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(one, yaml.MappingNode):
                raise self._error(node, "<< takes a mapping, or a list of mappings")
            yield one

    def _key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(node, "a key must be a name")
        return str(node.value)

    def _scalar(self, node: yaml.ScalarNode) -> JsonValue:
        if node.tag not in SCALARS:
            raise self._error(node, f"the tag {quoted(node.tag)} has no meaning in a recipe")
        if node.tag != TEXT and len(node.value) > MOST_NUMBER:
            raise self._error(node, f"a number has more than {MOST_NUMBER} characters")
        if node.tag == YAML_INT and UNLIKE_IT_LOOKS.match(node.value):
            read = self.loader.construct_object(node)
            raise self._error(node, f"{node.value} means {read} in YAML; write {read}, or quote it")
        try:
            return mended(self.loader.construct_object(node))
        except (ValueError, KeyError, OverflowError) as error:
            kind = node.tag.removeprefix(CORE)
            raise self._error(node, f"{node.value[:40]!r} is no {kind}") from error

    def _place(self, node: yaml.Node) -> str:
        return self.place(node.start_mark.line + 1)

    def _error(self, node: yaml.Node, problem: str) -> RecipeError:
        return RecipeError(f"{self._place(node)} isn't valid YAML of a recipe: {problem}.")


def dotted(path: Keys) -> str:
    """Return a path as users write it: weights.overrides.0.match."""
    return ".".join(str(part) for part in path)
