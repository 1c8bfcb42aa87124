"""Files that are there whole or not at all."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def written_whole(target: Path, *, durable: bool = False) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of `target` when the block ends without an error.

    A reader sees the old content or the new one, however many write at once. Its folder is made.
    `durable` lets it survive a loss of power: file and folder are synced, which takes milliseconds.

    Raises:
        OSError: it can't be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with partial.open("xb") as opened:
            yield opened
            if durable:
                opened.flush()
                os.fsync(opened.fileno())
        partial.replace(target)
        if durable:
            sync(target.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def written_over(target: Path) -> Iterator[IO[bytes]]:
    """Open a result that takes the place of an earlier one as `written_whole`; links are followed.

    A pipe, a device, a mounted file or one in a closed folder can't be replaced: it is written
    where it is.

    Raises:
        OSError: it can't be written.
    """
    file = Path(os.path.realpath(target))
    file.parent.stat()  # a result makes no folder: its name is more likely a slip
    stays = file.exists() and (
        not file.is_file() or os.path.ismount(file) or not os.access(file.parent, os.W_OK | os.X_OK)
    )
    with file.open("wb") if stays else written_whole(file) as opened:
        yield opened


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_entry(path: Path) -> None:
    """Remove a file, a link itself, or a directory with all in it; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
