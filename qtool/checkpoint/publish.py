"""Give a finished result its name, so that a kill at any point loses nothing. Torch-free.

`job.json` says how far it has come, and goes last. Beside OUT_DIR the names of the new directory
and the old one are exchanged, or, where the system can't, the old one steps aside first. Inside it
the old config.json goes first and the new one comes last: what has a config.json is complete.
"""

import contextlib
import ctypes
import os
import shutil
import sys
import uuid
from dataclasses import replace
from pathlib import Path

from qtool.checkpoint.marks import (
    CONFIG_NAME,
    JOB_NAME,
    Job,
    foreign_entries,
    inode,
    paths_below,
    read_job,
    write_job,
)
from qtool.checkpoint.place import Place
from qtool.storage.whole_files import sync

AT_FDCWD = -100
EXCHANGE = 2
"""RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS."""


def publish(place: Place, job: Job) -> None:
    """Move the work to OUT_DIR; call it again after a kill.

    Raises:
        OSError: it can't be moved; the work, and what was there, are as they were.
    """
    if place.inside:
        _move_in(place, job)
    else:
        _rename(place, job)


def repair(place: Place) -> None:
    """Finish, or take back, what a killed run had begun to rename or to move."""
    job = read_job(place.work_dir)
    if read_job(place.out_dir) is not None:
        _clean_up(place)
    elif job is not None and job.old_files is not None:
        _move_in(place, job)
    elif job is not None and job.aside is not None and inode(place.out_dir) is None:
        aside = place.out_dir.with_name(job.aside)
        if inode(aside) == job.old_inode:
            aside.rename(place.out_dir)


def _rename(place: Place, job: Job) -> None:
    work, out_dir = place.work_dir, place.out_dir
    old = inode(out_dir)
    if old is not None and any(out_dir.iterdir()):
        aside = out_dir.with_name(f"{out_dir.name}.replaced-{uuid.uuid4().hex[:8]}")
        write_job(work, replace(job, old_inode=old, aside=aside.name))
        if not exchange(work, out_dir):
            out_dir.rename(aside)
            try:
                work.rename(out_dir)
            except OSError:
                aside.rename(out_dir)
                raise
    else:
        if old is not None:
            with contextlib.suppress(OSError):  # an empty directory: the result has its rights
                work.chmod(out_dir.stat().st_mode | 0o700)
        work.rename(out_dir)
    sync(out_dir.parent)
    _clean_up(place)


def exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two directories in one step; False if the system can't."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(first), os.fsencode(second)
    try:
        if sys.platform == "darwin":
            return libc.renamex_np(*names, EXCHANGE) == 0
        return libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], EXCHANGE) == 0
    except AttributeError:  # a system, or a C library, without it
        return False


def _clean_up(place: Place) -> None:
    """Remove the directory that gave way, then the job: the last that a run does."""
    job = read_job(place.out_dir)
    if job is None:
        return
    asides = [place.out_dir.with_name(job.aside)] if job.aside else []
    for left in (place.work_dir, *asides):
        # The number alone may have been given anew, to the work of a later run.
        if inode(left) == job.old_inode is not None and read_job(left) is None:
            shutil.rmtree(left)
    (place.out_dir / JOB_NAME).unlink()


def _move_in(place: Place, job: Job) -> None:
    """Move file by file; what is there already was moved before a kill."""
    work, out_dir, files = place.work_dir, place.out_dir, job.files or ()
    if job.old_files is None:
        foreign = {*foreign_entries(out_dir)}
        old = tuple(path for path in paths_below(out_dir) if path not in foreign)
        job = replace(job, old_files=old)
        write_job(work, job)
        (out_dir / CONFIG_NAME).unlink(missing_ok=True)
        sync(out_dir)
    for path in files:
        if path != CONFIG_NAME and inode(work / path) is not None:
            (out_dir / path).parent.mkdir(parents=True, exist_ok=True)
            (work / path).replace(out_dir / path)
    old_files = {*(job.old_files or ())}
    for path in old_files & {*paths_below(out_dir)} - {*files}:
        (out_dir / path).unlink()
    for folder in {(out_dir / path).parent for path in old_files} - {out_dir}:
        with contextlib.suppress(OSError):  # the new result has files there too
            folder.rmdir()
    if inode(work / CONFIG_NAME) is not None:
        sync(out_dir)
        (work / CONFIG_NAME).replace(out_dir / CONFIG_NAME)
        sync(out_dir)
    remove_work(work)


def remove_work(work: Path) -> None:
    """Remove a work directory of ours; its mark goes last, so that it stays ours until then."""
    empty_work(work)
    (work / JOB_NAME).unlink(missing_ok=True)
    work.rmdir()


def empty_work(work: Path, keep: tuple[str, ...] = ()) -> None:
    """Remove everything from a work directory but its job and some files and folders."""
    for entry in work.iterdir():
        if entry.name in (JOB_NAME, *keep):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
