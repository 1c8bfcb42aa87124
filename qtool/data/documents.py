"""Collections of documents: the lines of a `.jsonl` file, or the rows of a data set of the hub.

A kind of source is one function from a name to a `Collection`, and one line in
`corpora.open_dataset`. Documents are read one by one, when their tokens are wanted: a file or a
data set may be much larger than what calibration takes of it.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from qtool.errors import DataError, MissingExtraError, QtoolError

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
HUB_PREFIX = "hub:"
HUB_NAME = re.compile(
    r"hub:(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?"
    r"(:(?P<config>[^:]*)(:(?P<split>[\w.-]+))?)?"
)

Messages = Sequence[Mapping[str, str]]
"""The turns of a chat, each with `role` and `content`."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text, or one chat."""

    content: str | Messages
    place: str
    """Where it comes from, for messages: file and line, or data set and row."""


@dataclass(frozen=True, slots=True)
class Collection:
    """Documents of one source."""

    name: str
    origin: Mapping[str, str | None]
    """What pins the content: the sha256 of a file, the revision of a data set of the hub."""
    documents: Iterator[Document]
    """Can be read once; errors in a document are raised when it is reached."""


def document(row: object, place: str) -> Document:
    """Return what one line or row holds: its `text`, or else its `messages`.

    Raises:
        DataError: it has neither.
    """
    values = row if isinstance(row, Mapping) else {}
    if isinstance(values.get("text"), str):
        return Document(values["text"], place)
    if _is_chat(values.get("messages")):
        return Document(values["messages"], place)
    found = ", ".join(map(repr, values)) or "no fields"
    raise DataError(
        f"{place} has {found}. It must be an object with 'text', a string, or with 'messages', a "
        "list of objects with 'role' and 'content'."
    )


def _is_chat(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, Mapping) and {type(turn.get(k)) for k in ("role", "content")} == {str}
            for turn in value
        )
    )


def jsonl_collection(path: Path) -> Collection:
    """Return the documents of a `.jsonl` or `.jsonl.gz` file, one per line; empty lines are none.

    Raises:
        DataError: the file is missing or can't be read.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise DataError(f"No file {path}.") from None
    except OSError as error:
        raise DataError(f"{path} can't be read: {error}.") from error
    return Collection(path.name, {"sha256": digest}, _lines(path))


def _lines(path: Path) -> Iterator[Document]:
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield document(json.loads(line), f"{path} line {number}")
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {number} isn't valid JSON: {error.msg}.") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read after line {number}: {error}.") from error


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def hub_collection(name: str) -> Collection:
    """Return the rows of a data set of the hub, streamed: only what is read is downloaded.

    Args:
        name: `hub:NAME:CONFIG:SPLIT`, such as `hub:allenai/c4:en:train`. An empty config is the
            data set's default, a missing split is `train`. `NAME@REVISION` pins a commit.

    Raises:
        DataError: the name is malformed, or the hub doesn't give the data set.
        MissingExtraError: the library `datasets` isn't installed.
    """
    parts = HUB_NAME.fullmatch(name)
    if parts is None:
        raise DataError(
            f"{name!r} names no data set of the hub. Write hub:NAME:CONFIG:SPLIT, such as "
            "hub:allenai/c4:en:train; CONFIG may be empty."
        )
    try:
        import datasets  # slow, and an extra
    except ImportError:
        raise MissingExtraError(name, "data") from None
    datasets.disable_progress_bars()  # the terminal belongs to qtool.cli
    try:
        builder = datasets.load_dataset_builder(
            parts["name"], parts["config"] or None, revision=parts["revision"]
        )
        rows = builder.as_streaming_dataset(split=parts["split"] or "train")
    except Exception as error:  # the hub client raises many unrelated types
        raise DataError(f"The hub didn't give {name}: {_reason(error)}") from error
    # datasets uses the commit as the hash of a builder without code of its own
    return Collection(name, {"revision": builder.hash}, _rows(rows, name))


def _rows(rows: Iterable[object], name: str) -> Iterator[Document]:
    try:
        for number, row in enumerate(rows, 1):
            yield document(row, f"{name} row {number}")
    except QtoolError:
        raise
    except Exception as error:  # the hub client raises many unrelated types
        raise DataError(f"The hub stopped giving {name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
