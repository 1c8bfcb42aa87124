"""Collections of documents: the lines of a `.jsonl` file, or the rows of a data set of the hub.

A kind of source is one function from a name to a `Collection`, and one line in
`corpora.open_dataset`. Documents are read one by one, when their tokens are wanted: a file or a
data set may be much larger than what calibration takes of it.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.errors import DataError, MissingExtraError, QtoolError
from qtool.storage.jsonl import check_file, json_lines
from qtool.wording import quoted, reason

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz")
HUB_PREFIX = "hub:"
HUB_NAME = re.compile(
    r"hub:(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?"
    r"(:(?P<config>[^:]*)(:(?P<split>[\w.-]+))?)?"
)

Messages = Sequence[Mapping[str, Any]]
"""The turns of a chat: `role`, and `content`, a text, or None where something else is there."""


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
        DataError: it has neither, or a turn of the chat isn't one.
    """
    values = row if isinstance(row, Mapping) else {}
    if isinstance(values.get("text"), str):
        return Document(values["text"], place)
    turns = values.get("messages")
    if isinstance(turns, list) and turns:
        return Document(
            [_turn(turn, f"{place}, turn {n}") for n, turn in enumerate(turns, 1)], place
        )
    found = (
        ", ".join(f"{quoted(key)} ({_kind(value)})" for key, value in values.items()) or "no fields"
    )
    raise DataError(
        f"{place} has {found}. It must be an object with 'text', a string, or with 'messages', a "
        "list of objects with 'role' and 'content'."
    )


def _turn(turn: object, place: str) -> Mapping[str, Any]:
    """Return one turn of a chat, its content as one text where it came in parts."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        found = _kind(turn.get("role")) if isinstance(turn, Mapping) else _kind(turn)
        raise DataError(f"{place} is no object with 'role', a string: found {found}.")
    content = turn.get("content")
    others = (value for key, value in turn.items() if key not in ("role", "content"))
    if isinstance(content, str) or (content is None and any(others)):  # such as calls of tools
        return turn
    if not isinstance(content, list):
        raise DataError(
            f"{place}: 'content' is {_kind(content)}. It must be a string, a list of texts "
            "({'type': 'text', 'text': ...}), or null in a turn that calls tools."
        )
    texts = []
    for number, part in enumerate(content, 1):
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise DataError(
                f"{place}: part {number} of 'content' has no 'text', a string. Images and the like "
                "can't be used; leave this chat out."
            )
        texts.append(text)
    return {**turn, "content": "".join(texts)}


def _kind(value: object) -> str:
    """Return what JSON calls a value."""
    kinds = {bool: "a boolean", str: "a string", int: "a number", float: "a number"}
    others = {type(None): "null", list: "a list" if value else "an empty list"}
    return (kinds | others).get(type(value), "an object")


def jsonl_collection(path: Path) -> Collection:
    """Return the documents of a `.jsonl` or `.jsonl.gz` file, one per line; empty lines are none.

    Raises:
        DataError: the file is missing or can't be read.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} can't be read: {reason(error)}.") from error
    documents = (document(row, place) for place, row in json_lines(path))
    return Collection(path.name, {"sha256": digest}, documents)


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
        raise DataError(f"The hub didn't give {name}: {reason(error)}") from error
    # datasets uses the commit as the hash of a builder without code of its own
    return Collection(name, {"revision": builder.hash}, _rows(rows, name))


def _rows(rows: Iterable[object], name: str) -> Iterator[Document]:
    try:
        for number, row in enumerate(rows, 1):
            yield document(row, f"{name} row {number}")
    except QtoolError:
        raise
    except Exception as error:  # the hub client raises many unrelated types
        raise DataError(f"The hub stopped giving {name}: {reason(error)}") from error
