"""One run per OUT_DIR: the work directory is locked for as long as its run lives. Torch-free.

The lock is on the directory itself, so none stays behind, and it goes with the directory when that
gets its final name.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from qtool.checkpoint.marks import inode, read_job
from qtool.checkpoint.place import Place, check_place, file_failures
from qtool.checkpoint.publish import repair
from qtool.errors import OutputError

PATIENCE = 20
"""Tries, 50 ms apart: another process may only be looking whether a run lives."""


def look(place: Place) -> None:
    """Check that a run may write there, without writing anything.

    Raises:
        OutputError: another run lives, something is in the way, or it can't be written.
    """
    with file_failures(place.out_dir):
        for tries_left in reversed(range(PATIENCE)):
            try:
                for directory in (place.work_dir, place.out_dir):
                    if read_job(directory) is not None:
                        os.close(locked(directory, place, fcntl.LOCK_SH))
                check_place(place)
            except FileNotFoundError:  # another run has just given its result its name
                if not tries_left:
                    raise
            else:
                return


def claim(place: Place) -> int:
    """Make the work directory if there is none, lock it, repair what a killed run left.

    Returns:
        A descriptor; the lock is held until it is closed.

    Raises:
        OutputError: another run lives, or something is in the way.
        OSError: it can't be written.
    """

    def look_first() -> None:
        look(place)
        if read_job(place.out_dir) is not None:  # killed when its result had its name already
            descriptor = locked(place.out_dir, place, fcntl.LOCK_EX)
            try:
                repair(place)
            finally:
                os.close(descriptor)

    def look_again() -> None:
        repair(place)
        check_place(place)

    return made_and_locked(place.work_dir, place, before=look_first, check=look_again)


def made_and_locked(
    directory: Path,
    place: Place,
    *,
    before: Callable[[], object] = lambda: None,
    check: Callable[[], object] = lambda: None,
) -> int:
    """Make a directory if there is none, and lock that which has its name from then on.

    Args:
        directory: Where the work lies. Others may lock it, too, remove it and rename it at any time
            before.
        place: For messages.
        before: Called ahead of each try, without the lock.
        check: Called under the lock. If it raises, the directory is given up, and removed if it
            is empty; if it renames it, there is another try.

    Returns:
        A descriptor; the lock is held until it is closed.

    Raises:
        OutputError: another run lives, or others keep making and removing the directory.
        OSError: it can't be made or locked.
    """
    for _ in range(PATIENCE):
        with contextlib.suppress(FileNotFoundError):  # another run has just changed its name
            before()
            directory.mkdir(parents=True, exist_ok=True)
            descriptor = locked(directory, place, fcntl.LOCK_EX)
            try:
                if _is_at(descriptor, directory):
                    check()
                    if _is_at(descriptor, directory):
                        return descriptor
            except BaseException:
                let_go(descriptor, directory)
                raise
            os.close(descriptor)
    raise OutputError(f"Other runs keep changing {place.out_dir}. Wait for their end.")


def let_go(descriptor: int, directory: Path) -> None:
    """Give up a directory that is locked, and remove it if it still has its name and is empty."""
    with contextlib.suppress(OSError):  # it isn't empty: somebody's work
        if _is_at(descriptor, directory):
            directory.rmdir()
    os.close(descriptor)


def _is_at(descriptor: int, directory: Path) -> bool:
    return os.fstat(descriptor).st_ino == inode(directory)


def can_lock(descriptor: int) -> bool:
    """Return whether the file system has locks; some that lie on a network haven't."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def locked(directory: Path, place: Place, kind: int) -> int:
    """Return a descriptor of a directory, which holds a lock until it is closed.

    Raises:
        OutputError: another run has one.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(PATIENCE):
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:  # the file system has no locks
            return descriptor
        else:
            return descriptor
    os.close(descriptor)
    raise OutputError(
        f"Another run is writing {place.out_dir}; it lives, or is stopped. Wait for its end, end "
        "it, or name another directory."
    )
