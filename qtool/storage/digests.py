"""Digests of files, remembered so that a checkpoint that hasn't changed isn't read again.

Reading 140 GB takes minutes. What is remembered goes by path, size, times and inode, as in git's
index: whatever writes to a file changes one of them, unless it does so within the resolution of the
clock; files that were changed a moment ago are therefore always read.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

from qtool.storage.store import Store

SETTLED_NS = 2_000_000_000
"""How old a change must be: file systems count time in steps of up to two seconds."""
DIGESTS = "digests"
"""What the store calls them."""

State = tuple[int, ...]


def files_digest(files: Iterable[Path], *, remember: bool = True) -> str:
    """Return one digest of the names and contents of some files, each of which counts once.

    Raises:
        OSError: a file can't be read.
    """
    whole = hashlib.sha256()
    with Store() as store:
        for file in sorted(set(files)):
            digest = _remembered(file, store) if remember else _digest(file)
            whole.update(file.name.encode() + digest)
    return whole.hexdigest()


def state_of(file: Path) -> State:
    """Return what changes whenever a file does: size, mtime and ctime in ns, inode."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _remembered(file: Path, store: Store) -> bytes:
    """Return the digest of a file from the store, or take it and add it there."""
    path, state = os.fsencode(file.resolve()), state_of(file)
    begin = b"%d %d %d %d " % state
    kept = store.read(DIGESTS, "", path).get(path, b"")
    if kept.startswith(begin) and _is_settled(state):
        return kept.removeprefix(begin)
    digest = _digest(file)
    if state_of(file) == state and _is_settled(state):
        with contextlib.suppress(OSError):  # a cache that can't be written costs time, no result
            gone = [p for p in store.read(DIGESTS, "") if not os.path.exists(p)]  # noqa: PTH110
            store.remove(DIGESTS, "", gone)
            store.add(DIGESTS, "", {path: begin + digest})
    return digest


def _is_settled(state: State) -> bool:
    """Return whether a file's last change is long ago; never for times that are still to come."""
    _, changed, moved, _ = state
    return time.time_ns() - max(changed, moved) > SETTLED_NS


def _digest(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()
