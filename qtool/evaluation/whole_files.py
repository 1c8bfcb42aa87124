"""Files that are there whole or not at all."""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of `target` when the block ends without an error.

    A reader sees the old content or the new one, however many write at once.

    Args:
        target: Its folder is made.

    Raises:
        OSError: it can't be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with partial.open("xb") as opened:
            yield opened
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
