"""Options of plug-ins: from what a recipe says to the plug-in's own dataclass."""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from qtool import plugins
from qtool.errors import RecipeError
from qtool.plugins import PluginOptions
from qtool.recipe.load import rule
from qtool.wording import quoted

_validator = cache(TypeAdapter)
"""Of options: it takes milliseconds to make, and every layer asks for one."""


def read_options(plugin: str, options: type, values: Mapping[str, Any], key: str) -> PluginOptions:
    """Return an instance of a plug-in's options.

    Args:
        plugin: Its name.
        options: Frozen dataclass.
        values: By option.
        key: Where the recipe has them, such as `weights.options`.

    Raises:
        RecipeError: unknown key, wrong type or impossible value.
    """
    known = tuple(field.name for field in fields(options))
    for name in values:
        if name not in known:
            raise RecipeError(plugins.describe_miss(str(name), known, f"{key} of '{plugin}'"))
    try:
        return _validator(options).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        full = ".".join((key, *map(str, first["loc"])))
        raise RecipeError(f"{full} is {quoted(first['input'])}; {rule(first)}.", key=full) from None
