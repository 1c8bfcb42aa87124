"""Digests of files, remembered so that a checkpoint that hasn't changed isn't read again.

Reading 140 GB takes minutes. What is remembered goes by path, size, times and inode, as in git's
index: whatever writes to a file changes one of them, unless it does so within the resolution of the
clock; files that were changed a moment ago are therefore always read.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from qtool.settings import cache_dir
from qtool.storage.whole_files import written_whole

SETTLED_NS = 2_000_000_000
"""How old a change must be: file systems count time in steps of up to two seconds."""

State = tuple[int, ...]
Memory = Mapping[str, tuple[State, str]]
"""State and digest by resolved path."""


def files_digest(files: Iterable[Path], *, remember: bool = True) -> str:
    """Return one digest of the names and contents of some files.

    Args:
        files: Some may be given twice.
        remember: Use and keep digests in the cache.

    Raises:
        OSError: a file can't be read.
    """
    whole = hashlib.sha256()
    known = _read_memory() if remember else {}
    fresh: dict[str, tuple[State, str]] = {}
    try:
        for file in sorted(set(files)):
            path, state = str(file.resolve()), state_of(file)
            found = known.get(path)
            if found is not None and found[0] == state and _is_settled(state):
                digest = found[1]
            else:
                digest = _digest(file)
                if state_of(file) == state and _is_settled(state):
                    fresh[path] = (state, digest)
            whole.update(file.name.encode() + bytes.fromhex(digest))
    finally:
        if remember and fresh:  # after Ctrl-C too: the next call goes on from here
            _add_to_memory(fresh)
    return whole.hexdigest()


def state_of(file: Path) -> State:
    """Return what changes whenever a file does: size, mtime and ctime in ns, inode."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _is_settled(state: State) -> bool:
    """Return whether a file's last change is long ago; never for times that are still to come."""
    _, changed, moved, _ = state
    return time.time_ns() - max(changed, moved) > SETTLED_NS


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _is_there(path: str) -> bool:
    try:
        Path(path).stat()
    except (OSError, ValueError):  # gone, or in a folder that is closed by now
        return False
    return True


def _memory_file() -> Path:
    return cache_dir() / "digests.json"


def _read_memory() -> Memory:
    """Return what is remembered; nothing if the file is damaged."""
    try:
        values = json.loads(_memory_file().read_text(encoding="utf-8"))
        return {
            str(path): (tuple(map(int, state)), _checked(digest))
            for path, (state, digest) in values.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}


def _checked(digest: str) -> str:
    value = bytes.fromhex(digest)
    if len(value) != hashlib.sha256().digest_size:
        raise ValueError(digest)
    return value.hex()


def _add_to_memory(fresh: Memory) -> None:
    """Remember digests; of two that write at once, one may be lost, and is found again."""
    with contextlib.suppress(OSError):  # a cache that can't be written costs time, no result
        kept = {path: entry for path, entry in _read_memory().items() if _is_there(path)}
        with written_whole(_memory_file()) as opened:
            opened.write(json.dumps({**kept, **fresh}, indent=0).encode())
