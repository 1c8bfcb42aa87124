"""A folder that takes many results and tables of them: checked before the first, held by one run.

Results guard their own places; this is about what lies between them. Torch-free.
"""

import contextlib
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from qtool.checkpoint.claim import let_go, made_and_locked
from qtool.checkpoint.marks import is_checkpoint
from qtool.checkpoint.place import check_writable, file_failures, find_place
from qtool.errors import OutputError


def check_collection(out_dir: Path, what: str) -> None:
    """Check that a folder can take results; nothing is written.

    Args:
        out_dir: The folder, which may have results already.
        what: Writes there, such as `a grid`.

    Raises:
        OutputError: it can't be made or written, or is a checkpoint itself.
    """
    place = find_place(out_dir)
    with file_failures(out_dir):
        if is_checkpoint(out_dir):
            raise OutputError(
                f"{out_dir} is a checkpoint, and {what} writes a directory of them. Give another "
                "one."
            )
        if os.path.lexists(place.out_dir) and not place.out_dir.is_dir():
            raise OutputError(f"{out_dir} is a file. Name a directory.")
        check_writable(place)


def check_table(file: Path, keys: Collection[str], drawn: Collection[str] = ()) -> None:
    """Check that a table, and pictures of it, replace only those of an earlier run.

    Args:
        file: The table, JSON.
        keys: That an earlier one has.
        drawn: Names of pictures of it, beside it.

    Raises:
        OutputError: something else is there.
    """
    with file_failures(file):
        others = [file.with_name(name) for name in drawn]
        found = [path for path in (file, *others) if os.path.lexists(path)]
    if found and not _is_table(file, keys):
        raise OutputError(
            f"{found[0]} isn't of an earlier run of this command, and would be replaced. Move it "
            "away, or name another directory."
        )


def _is_table(file: Path, keys: Collection[str]) -> bool:
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and {*keys} <= values.keys()


@contextlib.contextmanager
def held(out_dir: Path) -> Iterator[None]:
    """Make a folder of results, and keep other runs from writing tables there.

    One that is made and in which nothing lies at the end is removed.

    Raises:
        OutputError: another run writes there, or it can't be made.
    """
    with file_failures(out_dir):
        is_new = not os.path.lexists(out_dir)
        place = find_place(out_dir)
        descriptor = made_and_locked(place.out_dir, place)
    try:
        yield
    finally:
        if is_new:
            let_go(descriptor, place.out_dir)
        else:
            os.close(descriptor)
