"""Folders that are made once and kept: whole, by a list of their files with their digest."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from qtool.storage.digests import files_digest
from qtool.storage.plain_json import write_json_file

WHOLE_NAME = "WHOLE"
"""The list; without a suffix, so that nobody takes it for a part of a model."""


def note_whole(folder: Path, listing: Path, made_by: int) -> None:
    """Write the list of what lies in a folder, which says that nothing is missing there.

    Args:
        folder: All of its files are listed.
        listing: File for the list.
        made_by: Version of what made them.

    Raises:
        OSError: it can't be written.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    about = {
        "conversion": made_by,
        "files": [str(file.relative_to(folder)) for file in files],
        "digest": files_digest(files, remember=False),
    }
    write_json_file(listing, about)


def is_whole(folder: Path, listing: Path, made_by: int) -> bool:
    """Return whether all files of a folder are there, as they were when they were listed."""
    try:
        about = json.loads(listing.read_text(encoding="utf-8"))
        files = [folder / name for name in about["files"]]
        current = about["conversion"] == made_by and bool(files)
        return current and about["digest"] == files_digest(files)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Let one process at a time into the block; a process that ends, however, lets the next in.

    Raises:
        OSError: the file can't be made.
    """
    import fcntl  # not on Windows

    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as opened:
        with contextlib.suppress(OSError):  # a file system without locks: the slower one wins
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
