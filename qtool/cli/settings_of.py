"""Options of plug-ins, as the command line has them: `--set KEY=VALUE`."""

from collections.abc import Sequence
from typing import Any

import typer
import yaml


def parsed_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Return options of a plug-in: values as YAML has them."""
    found = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"--set takes KEY=VALUE, not {setting!r}.")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise typer.BadParameter(f"--set {key}: {value!r} isn't a value.") from error
    return found
