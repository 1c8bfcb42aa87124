"""The file of what was asked and answered, one JSON object a line."""

import contextlib
import functools
import gzip
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from qtool.errors import OutputError
from qtool.evaluation.lm_eval.item_rows import AddRows
from qtool.storage.jsonl import Row
from qtool.storage.plain_json import json_text
from qtool.storage.whole_files import written_whole
from qtool.wording import reason


@contextlib.contextmanager
def row_file(target: Path | None) -> Iterator[Callable[[Mapping[str, Any]], AddRows] | None]:
    """Open a file of rows, gzipped if its name says so; it is there when the block has ended.

    Links are followed; a device or a pipe can't be replaced by a whole file, and is refused.

    Yields:
        A function from what all rows of a model begin with to a function that adds rows; None if
        there is no target.

    Raises:
        OutputError: the file can't be written.
    """
    if target is None:
        yield None
        return
    if target.exists() and not target.is_file():
        raise OutputError(f"Can't write {target}: it isn't an ordinary file. Name one that is.")

    def add(begin: Mapping[str, Any], requested: str, rows: Iterable[Row]) -> None:
        with _written_to(target):
            for row in rows:
                line = json_text({**begin, "requested": requested, **row}, indent=None)
                opened.write(line.encode() + b"\n")

    with contextlib.ExitStack() as stack:
        with _written_to(target):
            opened: IO[bytes] | gzip.GzipFile
            opened = stack.enter_context(written_whole(Path(os.path.realpath(target))))
            if target.suffix == ".gz":
                opened = stack.enter_context(gzip.GzipFile("", "wb", 6, opened, mtime=0))
        yield lambda begin: functools.partial(add, begin)
        with _written_to(target):
            stack.close()


@contextlib.contextmanager
def _written_to(target: Path) -> Iterator[None]:
    """Turn what goes wrong with a file of rows inside the block into an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"Can't write {target}: {reason(error)}. Scores that are kept have their rows beside "
            "them: the same command with another file runs only what is missing."
        ) from error
