"""Which methods a layer may be solved by: what a recipe says of them, checked and with options."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import qtool.methods
from qtool import plugins
from qtool.base import Method
from qtool.errors import RecipeError, SchemeError
from qtool.plugins import PluginOptions
from qtool.recipe.schema import TableSection, WeightsSection
from qtool.steps.options import read_options
from qtool.wording import quoted

MethodChoice = tuple[tuple[str, Any], ...]
"""Methods by name, each with an instance of its options; the preferred one first."""


def load_method(name: str) -> Method:
    """Return a method by name."""
    return plugins.load(qtool.methods, name, "METHOD", Method)


def methods_of(section: WeightsSection | TableSection) -> MethodChoice:
    """Return what a layer is solved by; several if its recipe has it choose.

    The others take of the options those that they know.

    Raises:
        RecipeError: an option is wrong, or the first of several isn't the section's method.
        UnknownNameError: there is no such method.
    """
    others = section.choose.method if isinstance(section, WeightsSection) else ()
    if others and (others[0] != section.method or len(set(others)) < len(others)):
        raise RecipeError(
            f"weights.choose.method is {quoted(list(others))}; it should begin with "
            f"weights.method, which is {quoted(section.method)}, and name each method once.",
            key="weights.choose.method",
        )
    first = load_method(section.method)
    found = [(section.method, parse_options(section.method, first, section.options))]
    for name in others[1:]:
        method = load_method(name)
        known = {field.name for field in fields(method.options)}
        values = {key: value for key, value in section.options.items() if key in known}
        found.append((name, parse_options(name, method, values)))
    return tuple(found)


def parse_options(name: str, method: Method, values: Mapping[str, Any]) -> PluginOptions:
    """Return the options of a method, by its name.

    Raises:
        RecipeError: unknown key, wrong type or impossible value.
    """
    return read_options(name, method.options, values, "weights.options")


def check_bits(layer: str, choice: MethodChoice, num_bits: int, said: str) -> None:
    """Check that all methods of a layer have so many bits, as was said.

    Raises:
        SchemeError: one doesn't.
    """
    for name, _ in choice:
        allowed = load_method(name).num_bits
        if num_bits not in allowed:
            raise SchemeError(
                f"{layer}: {said}; '{name}' takes {allowed.start} to {allowed.stop - 1}.",
                layer=layer,
            )


def check_tunable(layer: str, choice: MethodChoice) -> None:
    """Check that what the methods of a layer write can be tuned.

    Raises:
        RecipeError: it can't.
    """
    for name, _ in choice:
        if not load_method(name).is_tunable:
            raise RecipeError(
                f"{layer}: weights of '{name}' can't be tuned. Leave out tuning, or use a method "
                "that writes another format.",
                layer=layer,
            )
