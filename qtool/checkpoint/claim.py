"""One run per OUT_DIR: the work directory is locked for as long as its run lives. Torch-free.

The lock is on the directory itself, so none stays behind, and it goes with the directory when that
gets its final name.
"""

import contextlib
import fcntl
import os
import time
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
    for _ in range(PATIENCE):
        look(place)
        with contextlib.suppress(FileNotFoundError):  # another run has just changed its name
            if read_job(place.out_dir) is not None:  # killed when its result had its name already
                descriptor = locked(place.out_dir, place, fcntl.LOCK_EX)
                try:
                    repair(place)
                finally:
                    os.close(descriptor)
            place.work_dir.mkdir(parents=True, exist_ok=True)
            descriptor = locked(place.work_dir, place, fcntl.LOCK_EX)
            if _is_ours(descriptor, place):
                return descriptor
            os.close(descriptor)
    raise OutputError(f"Other runs keep changing {place.out_dir}. Wait for their end.")


def _is_ours(descriptor: int, place: Place) -> bool:
    """Check again under the lock; False if what is locked isn't the work directory any more."""
    if os.fstat(descriptor).st_ino != inode(place.work_dir):
        return False
    try:
        repair(place)
        if os.fstat(descriptor).st_ino != inode(place.work_dir):
            return False
        check_place(place)
    except BaseException:
        with contextlib.suppress(OSError):  # it isn't empty: somebody's work
            place.work_dir.rmdir()
        os.close(descriptor)
        raise
    return True


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
