"""Text and JSON lines as people have them: the only reader of either.

Files come from spreadsheets, editors of other systems and scrapers: with byte order marks, CRLF,
halves of surrogate pairs, packed under a name that doesn't say so. What has one meaning is read;
anything else is one sentence with file and line.
"""

import gzip
import json
import lzma
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from qtool.errors import DataError
from qtool.storage.plain_json import JsonValue
from qtool.wording import reason

Row = dict[str, Any]
GZIP_MAGIC = b"\x1f\x8b"
XZ_MAGIC = b"\xfd7zXZ\x00"
BYTE_ORDER_MARK = "\ufeff"
"""The byte order mark: inside a file too, where files were joined."""
MOST_LINE_BYTES = 1 << 26
"""A longer line is no document but a file without line breaks, and would fill the memory."""
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def check_file(path: Path) -> None:
    """Raise unless a path is an ordinary file: a pipe would wait for somebody to write to it.

    Raises:
        DataError: there is none, or it is something else, or it can't be looked at.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise DataError(f"No file {path}.", file=path) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        message = f"{str(path)!r} can't be read: {reason(error)}."
        raise DataError(message, file=path) from error
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "no ordinary file"
        raise DataError(f"{path} can't be read: it is {kind}. Give a file.", file=path)


def read_text(path: Path, *, most_bytes: int | None = None) -> str:
    r"""Return a file of UTF-8 text, maybe gzipped, with lines ended by "\n" and no byte order mark.

    Raises:
        DataError: it isn't there, isn't UTF-8, can't be read, or has more than `most_bytes`.
    """
    with _Reading(path) as reading:
        content = reading.file.read(-1 if most_bytes is None else most_bytes + 1)
        if most_bytes is not None and len(content) > most_bytes:
            raise DataError(f"{path} has more than {most_bytes} bytes. Is it the right file?")
        reading.line = 1
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            reading.line = content[: error.start].count(b"\n") + 1
            raise
    return "\n".join(line.removeprefix(BYTE_ORDER_MARK) for line in re.split("\r\n|\r|\n", text))


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield place and value of each line of a .jsonl file, maybe gzipped; empty lines are none.

    A half of a surrogate pair becomes U+FFFD: it is in no text, and no tokenizer takes it.

    Yields:
        Such as ("rows.jsonl line 3", {"text": "..."}).

    Raises:
        DataError: the file isn't there or can't be read, or a line isn't JSON or not UTF-8.
    """
    with _Reading(path) as reading:
        lines = iter(lambda: reading.file.readline(MOST_LINE_BYTES + 1), b"")
        for reading.line, line in enumerate(lines, 1):
            if len(line) > MOST_LINE_BYTES:
                raise DataError(f"{path} line {reading.line} is longer than 64 MiB. Split it.")
            text = line.decode().lstrip(BYTE_ORDER_MARK)
            if text.strip():
                place = f"{path} line {reading.line}"
                yield place, json_value(text, place)


def json_objects(path: Path) -> Iterator[Row]:
    """Yield the objects of a .jsonl file.

    Raises:
        DataError: as `json_lines`, or a line isn't a JSON object.
    """
    for place, row in json_lines(path):
        if not isinstance(row, dict):
            raise DataError(f"{place} isn't a JSON object.")
        yield row


def json_value(text: str, place: str) -> JsonValue:
    """Return the value of a JSON text, without halves of surrogate pairs.

    Raises:
        DataError: it isn't JSON, is nested too deeply, or has a number beyond all bounds.
    """
    try:
        value = json.loads(text)
        return mended(value) if SURROGATE_ESCAPE.search(text) else value
    except json.JSONDecodeError as error:
        raise DataError(f"{place} isn't valid JSON: {error.msg}.") from error
    except RecursionError:
        raise DataError(f"{place} isn't usable JSON: it is nested too deeply.") from None
    except ValueError:
        raise DataError(f"{place} isn't usable JSON: a number has thousands of digits.") from None


def mended(value: JsonValue) -> JsonValue:
    """Return a value of JSON with U+FFFD for each half of a surrogate pair in its texts."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, dict):
        return {mended(key): mended(one) for key, one in value.items()}
    if isinstance(value, list):
        return [mended(one) for one in value]
    return value


class _Reading:
    """An opened file; what goes wrong while it is read becomes a DataError that names the line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.line = 0
        self.file: IO[bytes]

    def __enter__(self) -> "_Reading":
        check_file(self.path)
        try:
            self.file = _opened(self.path)
        except OSError as error:
            message = f"{self.path} can't be read: {reason(error)}."
            raise DataError(message, file=self.path) from error
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self.file.close()
        if isinstance(error, UnicodeDecodeError):
            raise DataError(
                f"{self.path} line {self.line} isn't UTF-8 text. Save the file as UTF-8.",
                file=self.path,
            ) from error
        if isinstance(error, (OSError, EOFError, zlib.error, lzma.LZMAError)):
            raise DataError(
                f"{self.path} can't be read after line {self.line}: {reason(error)}.",
                file=self.path,
            ) from error


def _opened(path: Path) -> IO[bytes]:
    """Open a file, unpacked if its content says so: browsers and people change names."""
    file = path.open("rb")
    for magic, opener in ((GZIP_MAGIC, gzip.open), (XZ_MAGIC, lzma.open)):
        if file.peek(len(magic)).startswith(magic):
            file.close()
            return opener(path)  # type: ignore[return-value]  # reads bytes, as IO does
    return file
