"""Tuning tables as files: a `Selection` per card in the cache, written by `qtool bench --tune`."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from qtool import settings
from qtool.errors import BackendError
from qtool.runtime.backends.cuda.selection import Selection, Tuning
from qtool.storage.plain_json import JsonValue, write_json_file

TABLE_VERSION = 1
TABLE_FOLDER = "tuning"
OTHERS = re.compile(r"[^a-z0-9]+")


def selection_path(card_name: str) -> Path:
    """Return where the tuning table of a card lies, if there is one."""
    return (
        settings.cache_dir()
        / TABLE_FOLDER
        / f"{OTHERS.sub('-', card_name.lower()).strip('-')}.json"
    )


def write_selection(selection: Selection) -> Path:
    """Write the tuning table of the card that it was measured on; return where.

    Raises:
        OSError: it can't be written.
    """
    path = selection_path(selection.measured_on)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_file(path, {"version": TABLE_VERSION, **as_numbers(selection)})
    return path


def read_selection(card_name: str) -> Selection | None:
    """Return the tuning table of a card; None: it has none.

    Raises:
        BackendError: the file isn't such a table.
    """
    path = selection_path(card_name)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, str(error)) from error
    try:
        found = json.loads(text)
        if found.pop("version") != TABLE_VERSION:
            raise _unreadable(path, f"its version isn't {TABLE_VERSION}")
        selection = from_numbers(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error
    return selection if selection.measured_on == card_name else None


def _unreadable(path: Path, why: str) -> BackendError:
    return BackendError(
        f"The tuning table {path} can't be used ({why}). Write it anew with `qtool bench --tune`, "
        "or delete it: then the measured tables that come with qtool are used."
    )


def as_numbers(selection: Selection) -> dict[str, Any]:
    """Return a selection as JSON has it: ranges as [first, one beyond the last]."""
    return {field.name: _plain(getattr(selection, field.name)) for field in fields(selection)}


def _plain(value: JsonValue) -> JsonValue:
    if isinstance(value, range):
        return [value.start, value.stop]
    if isinstance(value, Tuning):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def from_numbers(found: dict[str, Any]) -> Selection:
    """Invert `as_numbers`.

    Raises:
        ValueError: something is missing or unknown, or a number isn't one that the kernels can be
            launched with.
        TypeError: something isn't a list or an object that should be.
    """
    known = {field.name for field in fields(Selection)}
    if found.keys() != known:
        odd = ", ".join(sorted(found.keys() ^ known))
        raise ValueError(f"missing, or known to nobody: {odd}")
    wide, wide_of_few = (tuple(map(_range, found[name])) for name in ("wide", "wide_of_few"))
    if not (wide and wide_of_few):
        raise ValueError("a list of ranges is empty")
    return Selection(
        measured_on=str(found["measured_on"]),
        most_products=_whole(found["most_products"], "most_products"),
        least_weights=_whole(found["least_weights"], "least_weights"),
        tables=_range(found["tables"]),
        wide=wide,
        wide_of_few=wide_of_few,
        most_groups=_whole(found["most_groups"], "most_groups"),
        alone=_tuning(found["alone"]),
        pairs=_tuning(found["pairs"]),
    )


def _tuning(found: dict[str, Any]) -> Tuning:
    tuning = Tuning(**{n: _whole(value, n, least=int(n != "early")) for n, value in found.items()})
    if tuning.stages < 2 or tuning.warps > 32:  # noqa: PLR2004 - one in use, one on its way
        raise ValueError(f"{tuning} can't be launched")
    return tuning


def _range(found: list[int]) -> range:
    start, stop = (_whole(value, "a range", least=0) for value in found)
    return range(start, stop)


def _whole(value: JsonValue, name: str, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{name} is {value!r}")
    return value
