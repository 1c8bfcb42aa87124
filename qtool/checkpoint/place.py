"""Where a result goes: found and checked before any work is done. Torch-free.

A result arrives by renaming `OUT_DIR.partial`, or, where OUT_DIR can't be renamed, by moving its
files out of `OUT_DIR/.partial`.
"""

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from qtool.checkpoint.marks import (
    JOB_NAME,
    foreign_entries,
    inode,
    is_checkpoint,
    names_in,
    paths_below,
    read_job,
)
from qtool.errors import FULL, OutputError
from qtool.wording import list_names, reason, shown

INSIDE = ".partial"
ASIDE_BYTES = len(".replaced-") + 8
"""What the longest name that is made beside OUT_DIR adds to its name."""
IGNORED = ("lost+found", INSIDE)
"""Not the user's: what ext4 puts into a volume, and our own work, which is checked by itself."""
HALF_JOB = re.compile(re.escape(JOB_NAME) + r"\.[0-9a-f]{12}\.partial")
"""As `written_whole` calls what it hasn't finished."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the result goes and where it is made; both absolute, links resolved."""

    out_dir: Path
    work_dir: Path
    named: Path
    """OUT_DIR as the user names it."""
    overwrite: bool = False
    """A checkpoint that is there is replaced, an unfinished run dropped."""
    resume: bool = False
    """An unfinished run is continued."""

    @property
    def inside(self) -> bool:
        """Whether the work lies in OUT_DIR, because that can't be renamed."""
        return self.work_dir.parent == self.out_dir


@contextlib.contextmanager
def file_failures(out_dir: Path) -> Iterator[None]:
    """Turn failures of the file system into an OutputError, which is one line."""
    try:
        yield
    except OSError as error:
        raise describe(error, out_dir) from error


def describe(error: OSError, out_dir: Path) -> OutputError:
    """Return what an error of the file system means for who writes `out_dir`."""
    if error.errno in FULL:
        return OutputError(f"The disk of {out_dir} is full. Free some space.")
    if error.errno == errno.ENAMETOOLONG:
        name = shown(str(out_dir))
        return OutputError(f"Can't write {name}: {reason(error)}. Choose a shorter name.")
    return OutputError(f"Can't write {out_dir}: {reason(error)}.")


def find_place(out_dir: Path, *, overwrite: bool = False, resume: bool = False) -> Place:
    """Resolve OUT_DIR and decide where the work lies; nothing is written.

    Raises:
        OutputError: a directory of that name can't be made.
    """
    with file_failures(out_dir):
        resolved = _resolve(out_dir)
        inside = Place(resolved, resolved / INSIDE, out_dir, overwrite, resume)
        if not resolved.name:
            return inside
        beside = replace(inside, work_dir=resolved.with_name(resolved.name + ".partial"))
        if read_job(beside.work_dir) is not None:
            return beside
        if read_job(inside.work_dir) is not None or _stays(resolved):
            return inside
        return beside


def _resolve(out_dir: Path) -> Path:
    text = str(out_dir)
    if not text.isascii() and text.encode(errors="ignore").decode() != text:
        raise OutputError(f"The name {text!r} isn't UTF-8. Choose another.")
    if any(ord(letter) < ord(" ") for letter in text):
        raise OutputError(f"The name {text!r} has control characters. Choose another.")
    try:
        expanded = out_dir.expanduser()
        resolved = expanded.resolve()
    except (RuntimeError, ValueError) as error:  # an unknown user, a loop of links
        raise OutputError(f"{out_dir} isn't a place for a checkpoint: {error}.") from error
    for path in (expanded, *expanded.parents):
        if path.is_symlink() and not path.exists():  # a volume that isn't mounted, perhaps
            raise OutputError(
                f"{path} is a link to {path.resolve()}, which doesn't exist. Make that directory, "
                "or name another."
            )
    return resolved


def nearest(path: Path) -> Path:
    """Return the path, or the first folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _stays(out_dir: Path) -> bool:
    """Return whether a directory is there that can't give its name away, or shouldn't."""
    if not out_dir.is_dir():
        return False
    if is_mount_point(out_dir) or not os.access(out_dir.parent, os.W_OK | os.X_OK):
        return True
    owners = {0, os.geteuid()}
    parent, own = out_dir.parent.stat(), out_dir.stat()
    if parent.st_mode & stat.S_ISVTX and not owners & {own.st_uid, parent.st_uid}:
        return True  # somebody else's directory in a folder such as /tmp
    entries = names_in(out_dir)
    if entries == {INSIDE}:  # of a run that was killed before it had written anything
        return True
    # Where the user stands in it, a shell would be left in a removed directory.
    return not entries and out_dir in (Path.cwd(), *Path.cwd().parents)


def is_mount_point(path: Path) -> bool:
    """Return whether something is mounted there, also from the same disk."""
    if os.path.ismount(path):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:  # not Linux
        return False
    escaped = [line.split(b" ")[4] for line in lines]
    return str(path) in {os.fsdecode(p.decode("unicode_escape").encode("latin-1")) for p in escaped}


def check_place(place: Place) -> None:
    """Check that a run may write there.

    Raises:
        OutputError: something is in the way that isn't ours, or that may not be replaced.
        OSError: it can't be looked at.
    """
    check_work(place)
    # A run that has ended may be asked to resume: the writer looks whether it is the same one.
    ended = place.resume and not place.overwrite and is_checkpoint(place.out_dir)
    job = read_job(place.work_dir)
    half_moved = job is not None and job.old_files is not None
    if not ended and not half_moved:
        check_target(place)
    check_writable(place)


def check_work(place: Place) -> None:
    """Check that the work can go where it is to.

    Raises:
        OutputError: something is there that isn't ours, or that isn't to be dropped or continued.
    """
    work = place.work_dir
    if inode(work) is None or _is_replaced_one(place):
        return
    if work.is_symlink() or not work.is_dir():
        raise OutputError(f"{work}, where the work would go, is no directory. Move it away.")
    if read_job(work) is None:
        if all(HALF_JOB.fullmatch(name) for name in names_in(work)):  # killed at the very start
            return
        raise OutputError(
            f"{work}, where the work would go, isn't the work of a run of qtool, and is left "
            "alone. Move it away, or name another OUT_DIR."
        )
    if not (place.overwrite or place.resume):
        raise OutputError(
            f"{work} holds an unfinished run. Continue it with --resume, "
            "or start over with --overwrite."
        )


def _is_replaced_one(place: Place) -> bool:
    """Return whether the new result has its name, and the old one waits to be removed."""
    job = read_job(place.out_dir)
    return (
        job is not None
        and job.old_inode == inode(place.work_dir)
        and read_job(place.work_dir) is None
    )


def check_target(place: Place) -> None:
    """Check that the result may get its name.

    Raises:
        OutputError: it exists and isn't to be replaced, or holds anything that we didn't write.
    """
    out_dir, ignored = place.out_dir, IGNORED if place.inside else ()
    if inode(out_dir) is None:
        return
    if not out_dir.is_dir():
        raise OutputError(f"{out_dir} is a file. Name a directory that doesn't exist yet.")
    if names_in(out_dir) <= {*ignored}:
        return
    if not is_checkpoint(out_dir):
        raise OutputError(
            f"{out_dir} exists and holds no checkpoint; --overwrite doesn't delete that. "
            "Remove it yourself, or name another directory."
        )
    if not place.overwrite:
        raise OutputError(f"{out_dir} exists. Pass --overwrite to replace it.")
    foreign = [path for path in foreign_entries(out_dir) if path.split("/")[0] not in ignored]
    if foreign:
        raise OutputError(
            f"{out_dir} holds what qtool didn't write: {list_names(foreign)}. --overwrite "
            "doesn't delete that; move it away, or name another directory."
        )


def check_writable(place: Place) -> None:
    """Check that the work and the result can be written.

    Raises:
        OutputError: a folder is closed, or the name too long.
    """
    folder = nearest(place.work_dir.parent)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{folder} isn't a directory that can be written.")
    out_dir = place.out_dir
    if out_dir.is_dir() and not os.access(out_dir, os.W_OK | os.X_OK):
        raise OutputError(f"{out_dir} can't be written: it is closed to you, or its disk is.")
    longest = os.pathconf(folder, "PC_NAME_MAX") - ASIDE_BYTES
    if not place.inside and len(os.fsencode(out_dir.name)) > longest:
        raise OutputError(
            f"The name of {shown(str(out_dir))} is too long; {longest} bytes are allowed."
        )


def check_free_space(place: Place, num_bytes: int, *, besides: int) -> None:
    """Check the disk before the first layer is solved.

    Args:
        place: Work that is there already counts as room: it is continued or removed.
        num_bytes: Of the weights of the result.
        besides: What is needed for a while beside them, in bytes.

    Raises:
        OutputError: the disk is too full.
    """
    with file_failures(place.out_dir):
        folder = nearest(place.work_dir.parent)
        free = shutil.disk_usage(folder).free + _size(place.work_dir)
    needed = num_bytes + besides
    if free < needed:
        raise OutputError(
            f"{folder} has {_megabytes(free)} free; writing {place.out_dir.name} takes "
            f"{_megabytes(needed)} for a while. Free some space or choose another disk."
        )


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.2f} MB"


def _size(work_dir: Path) -> int:
    if read_job(work_dir) is None:
        return 0
    try:
        return sum((work_dir / path).lstat().st_size for path in paths_below(work_dir))
    except FileNotFoundError:  # its run has just ended
        return 0
