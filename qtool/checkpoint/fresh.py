"""A result that is made anew each time and replaces nothing: an export, a dense model. Torch-free.

It is made in `DEST.partial`, which bears our mark and is locked as the work of a run is, and gets
its name when it is whole. What a killed process left there is dropped; nothing else ever is.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from qtool.checkpoint.claim import made_and_locked
from qtool.checkpoint.marks import JOB_NAME, Job, inode, names_in, read_job, write_job
from qtool.checkpoint.place import (
    HALF_JOB,
    Place,
    check_work,
    check_writable,
    file_failures,
    find_place,
)
from qtool.errors import OutputError
from qtool.storage.whole_files import remove_entry, sync

RESULT = "result"
"""What is made, in the work directory; the caller's file or directory."""
MADE_AT_ONCE = {"made": "at once, never resumed"}
"""Fingerprint of such work: whoever finds it without a lock may drop it."""


def find_fresh(dest: Path) -> Place:
    """Return where a result goes and is made; it is free, which is known before any work.

    Raises:
        OutputError: something is there, or where the work would go, or the place can't be written.
    """
    out_dir = find_place(dest).out_dir
    # Never inside: what could only be filled is there, and that is refused.
    work = out_dir.parent / f"{out_dir.name}.partial"
    place = Place(out_dir, work, dest, overwrite=True)
    with file_failures(dest):
        _check_free(place)
        check_writable(place)
    return place


@contextlib.contextmanager
def made_fresh(dest: Path) -> Iterator[Path]:
    """Give a path that isn't there yet; what the block makes there gets the name `dest`.

    If the block fails, nothing is left. If only the name can't be given, what was made is kept.

    Raises:
        OutputError: as `find_fresh`; another process makes it; or `dest` has come in between.
    """
    place = find_fresh(dest)
    with file_failures(dest):
        lock = made_and_locked(place.work_dir, place, check=lambda: _begin(place))
    made = place.work_dir / RESULT
    try:
        try:
            yield made
            with file_failures(dest):
                why = _why_unnamed(made, place)
        except BaseException:
            remove_entry(made)
            raise
        if why is not None:
            raise OutputError(
                f"{dest} {why}. What was made is whole, and stays in {made}. Move it."
            )
    finally:
        with contextlib.suppress(OSError):  # no mark, no claim: what is left is the user's
            _clear(place.work_dir)
        os.close(lock)


def _why_unnamed(made: Path, place: Place) -> str | None:
    """Give a result its name, and return None; or return why it can't have that."""
    if os.path.lexists(place.out_dir):
        return "exists by now"
    try:
        made.rename(place.out_dir)
    except OSError as error:
        return f"can't get its name: {error.strerror}"
    sync(place.out_dir.parent)
    return None


def _check_free(place: Place) -> None:
    if inode(place.out_dir) is not None or os.path.lexists(place.named):
        raise OutputError(f"{place.named} exists, and nothing is replaced. Name another place.")
    check_work(place)
    job = read_job(place.work_dir)
    if job is not None and job.fingerprint != MADE_AT_ONCE:
        raise OutputError(
            f"{place.work_dir}, where the work would go, holds an unfinished run of another "
            "command, and is left alone. Finish that one, or name another place."
        )


def _begin(place: Place) -> None:
    """Mark the work, and drop what a killed process left in it."""
    _check_free(place)
    write_job(place.work_dir, Job(fingerprint=MADE_AT_ONCE))
    remove_entry(place.work_dir / RESULT)


def _clear(work: Path) -> None:
    for name in names_in(work):
        if name == JOB_NAME or HALF_JOB.fullmatch(name):
            (work / name).unlink()
    work.rmdir()
