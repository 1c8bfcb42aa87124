"""Values as JSON has them, and the only place where qtool writes JSON for others."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qtool.storage.whole_files import written_whole

JsonValue = Any  # what `json.loads` returns, or YAML's reader; also what is to become such
HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair: JSON can write it as an escape, and UTF-8 has no bytes for it."""


def leaves(value: JsonValue) -> Iterator[tuple[str, Any]]:
    """Yield where each value is that holds no others, such as `layers.0.shape`, and the value."""
    waiting = [("", value)]
    while waiting:
        where, one = waiting.pop()
        held = dict(enumerate(one)) if isinstance(one, (list, tuple)) else one
        items = held.items() if isinstance(held, Mapping) else ()
        inner = [(f"{where}.{key}".removeprefix("."), child) for key, child in items]
        waiting += reversed(inner)
        if not inner:
            yield where, one


def first_half(value: JsonValue) -> str | None:
    """Return where the first text is, key or value, with half of a surrogate pair."""
    found = ((where, f"{where}{one}") for where, one in leaves(value))
    return next((where for where, text in found if HALF.search(text)), None)


def plain_json(value: JsonValue) -> JsonValue:
    """Return mappings, lists, texts, whole and finite numbers; anything else as its text.

    A number that isn't finite is None: JSON knows no NaN, and few readers take it.
    """
    if hasattr(value, "tolist"):  # numpy's, which needn't be imported for that
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain_json(one) for one in value]
    return str(value)


def json_text(value: JsonValue, *, indent: int | None = 2, ascii_only: bool = True) -> str:
    """Return a value as the text of a JSON file, without a line break at its end."""
    return json.dumps(plain_json(value), indent=indent, ensure_ascii=ascii_only, allow_nan=False)


def write_json_file(path: Path, value: JsonValue) -> None:
    """Write a JSON file that is there whole or not at all, and survives a loss of power.

    Raises:
        OSError: it can't be written.
    """
    with written_whole(path, durable=True) as file:
        file.write((json_text(value, ascii_only=False) + "\n").encode())


def config_text(value: JsonValue) -> str:
    """Return a value as the text of a file that transformers reads, with a line break at its end.

    A number that isn't finite stays one, in Python's words: `Infinity` is the end of a range in
    configurations of Mamba 2, and null would be refused there.
    """
    return json.dumps(value, indent=2, ensure_ascii=False, default=plain_json) + "\n"


def write_config_file(path: Path, value: JsonValue) -> None:
    """Write a file that transformers reads, as `write_json_file` does qtool's own.

    Raises:
        OSError: it can't be written.
    """
    with written_whole(path, durable=True) as file:
        file.write(config_text(value).encode())


def json_line(value: JsonValue) -> bytes:
    """Return a value on one line, for qtool's own store: all floats read back as they were."""
    return json.dumps(value, default=str).encode()
