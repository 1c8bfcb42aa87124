"""CheckpointWriter: streaming, sharded, resumable; nothing that is finished is ever lost.

Finished layers are spooled one by one; `finish` copies their bytes into shards, writes config.json
last, opens the result as a reader would, and gives it its name. So memory is bounded by one layer,
a run that was stopped or failed continues where it was, and a directory that has config.json is
complete.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.checkpoint.assemble import assemble
from qtool.checkpoint.claim import can_lock, claim
from qtool.checkpoint.manifest import LayerEntry
from qtool.checkpoint.marks import (
    CONFIG_NAME,
    JOB_NAME,
    Job,
    inode,
    read_job,
    read_report,
    write_job,
)
from qtool.checkpoint.place import Place, check_target, file_failures
from qtool.checkpoint.publish import empty_work, publish, remove_work
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.spool import Made, Spool
from qtool.checkpoint.spooled_layer import SpooledLayer
from qtool.errors import CheckpointError, OutputError, QtoolError
from qtool.storage.plain_json import json_text, write_config_file
from qtool.storage.whole_files import written_whole

MAX_SHARD_BYTES = 4 * 2**30
LAYERS = "layers"


WARNINGS = "run", "warnings"
"""Name and draft of what a run warned of: no finished work."""


class CheckpointWriter:
    """Writes one checkpoint; use as a context manager, which holds the lock of OUT_DIR.

    However the block is left, finished layers stay for `resume`; without any, nothing stays.
    """

    def __init__(self, place: Place, fingerprint: Mapping[str, Any]) -> None:
        """Claim the place and prepare the work directory.

        Args:
            place: Where the finished checkpoint goes, and what may happen to what is there.
            fingerprint: JSON-able; all that decides the output. A resumed run must have the same.

        Raises:
            OutputError: something is in the way, another run lives, or it can't be written.
        """
        self._names: list[str] = []
        self.has_ended = False
        """Whether the very same run has ended before, and its result is at OUT_DIR."""
        fingerprint = json.loads(json_text(fingerprint))  # as it is read again
        self.run_digest = sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
        """Tells the result of this run from those of all others."""
        self.place, self.work_dir = place, place.work_dir
        self._spool = Spool(self.work_dir / LAYERS)
        with file_failures(place.out_dir):
            self._lock = claim(place)
            try:
                self._job = self._open(fingerprint)
            except BaseException:
                self._release()
                raise
        self.is_locked = can_lock(self._lock)

    def _open(self, fingerprint: Mapping[str, Any]) -> Job:
        job = read_job(self.work_dir) if self.place.resume else None
        if job is None:
            self.has_ended = self.place.resume and self._is_result()
            if not self.has_ended:
                check_target(self.place)
            job = Job(fingerprint=fingerprint, is_stale=True)
            write_job(self.work_dir, job)
        _check_same(job, fingerprint, self.work_dir)
        if job.is_stale:
            empty_work(self.work_dir)
            job = Job(fingerprint=fingerprint)
            write_job(self.work_dir, job)
        if job.files is None:
            self._spool.open()
            empty_work(self.work_dir, keep=(LAYERS,))
        return job

    def _is_result(self) -> bool:
        if read_report(self.place.out_dir).get("run") != self.run_digest:
            return False
        try:
            CheckpointReader(self.place.out_dir)
        except CheckpointError:
            return False
        return True

    @property
    def is_sealed(self) -> bool:
        """Whether an earlier run has written everything, and only `publish` is missing."""
        return self._job.files is not None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        finished = self._count_finished()
        self._release()
        if not finished or error is None:
            return
        way_on = f"{finished} kept in {self.work_dir}: the same command with --resume goes on."
        if isinstance(error, QtoolError):
            error.args = (f"{error} {way_on}",)
        else:
            error.add_note(way_on)

    def _count_finished(self) -> str:
        """Say what a resumed run would find; '' if nothing."""
        job = read_job(self.work_dir)
        if job is None or job.is_stale:
            return ""
        if job.files is not None:
            return "All files of the result are"
        count = len(self._spool) - (self._spool.notes(_key(*WARNINGS)) is not None)
        return f"{count} finished layers are" if count > 1 else "1 finished layer is" * count

    def _release(self) -> None:
        """Give the lock back; remove a work directory in which nothing is finished."""
        with contextlib.suppress(OSError):
            is_here = os.fstat(self._lock).st_ino == inode(self.work_dir)
            if is_here and not self._count_finished():
                remove_work(self.work_dir)
        os.close(self._lock)

    def once(
        self, name: str, make: Callable[[], Made], *, draft: str | None = None
    ) -> Mapping[str, Any]:
        """Store what `make` makes, unless an earlier run did; nobody else asks for that.

        Args:
            name: Dotted name of the layer, or full name of a plain tensor.
            make: Called if nothing whole is stored under that name.
            draft: Which step it is the result of, if a later one makes something else of it: a
                resumed run finds it, and it isn't part of the checkpoint.

        Returns:
            The notes of what is stored.

        Raises:
            OutputError: the disk is full or the directory has become unwritable.
        """
        key = _key(name, draft)
        notes: Mapping[str, Any] | None = self._spool.notes(key)
        if notes is None:
            made = make()
            with file_failures(self.place.out_dir):
                self._spool.write(key, made.tensors(name), made.notes)
            notes = made.notes
        if draft is None:
            self._names.append(name)
        return notes

    def once_each(
        self, names: Sequence[str], make: Callable[[Sequence[str]], Iterator[Made]]
    ) -> Iterator[Mapping[str, Any]]:
        """Store what `make` makes of all names that no earlier run did; as `once`, one by one.

        Args:
            names: Of layers.
            make: Yields what those that are missing become, in their order.

        Yields:
            The notes of what is stored, of each name.

        Raises:
            OutputError: see `once`.
        """
        missing = [name for name in names if self._spool.notes(_key(name)) is None]
        made = make(missing) if missing else iter(())
        for name in names:
            yield self.once(name, partial(next, made))

    def keep(self, name: str, made: Made, *, draft: str) -> None:
        """Store a draft, in the place of one that is there.

        Raises:
            OutputError: the disk is full or the directory has become unwritable.
        """
        with file_failures(self.place.out_dir):
            self._spool.write(_key(name, draft), made.tensors(name), made.notes)

    def notes(self, name: str, *, draft: str | None = None) -> Mapping[str, Any]:
        """Return what was noted of what is stored."""
        return self._spool.notes(_key(name, draft)) or {}

    def tensors(self, name: str, *, draft: str | None = None) -> dict[str, Tensor]:
        """Return what is stored, by full name."""
        return self._spool.tensors(_key(name, draft))

    def load(
        self,
        name: str,
        entry: LayerEntry,
        device: str,
        *,
        draft: str | None = None,
        within: str | None = None,
    ) -> QuantizedTensor:
        """Return a layer that is stored, on a device; `within` names a draft of several layers."""
        key = _key(within or name, draft)
        return SpooledLayer(self._spool.directory, key, name, entry).load(device)

    def stored(self, name: str, entry: LayerEntry, *, draft: str | None = None) -> SpooledLayer:
        """Return where a layer is stored."""
        return SpooledLayer(self._spool.directory, _key(name, draft), name, entry)

    def digests(self) -> dict[str, str]:
        """Return sha256 of the stored bytes of every tensor so far, by name."""
        found: dict[str, str] = {}
        for name in self._names:
            found |= self._spool.digests(name)
        return dict(sorted(found.items()))

    def finish(self, files: Mapping[str, bytes], config: Mapping[str, Any]) -> None:
        """Assemble the shards, write config.json last, open the result, give it its name.

        Args:
            files: Other files by relative path: tokenizer, model card, report.
            config: Content of config.json, with `quantization_config`.

        Raises:
            OutputError: the disk is full, or OUT_DIR can't be replaced any more.
            CheckpointError: what was written can't be read.
        """
        with file_failures(self.place.out_dir):
            shards = assemble(self._spool, self._names, self.work_dir, MAX_SHARD_BYTES)
            ours = {name: content for name, content in files.items() if name != JOB_NAME}
            for name, content in ours.items():
                with written_whole(self.work_dir / name, durable=True) as file:
                    file.write(content)
            write_config_file(self.work_dir / CONFIG_NAME, config)
            CheckpointReader(self.work_dir)
            self._job = replace(self._job, files=(*shards, *ours, CONFIG_NAME))
            write_job(self.work_dir, self._job)
        self.publish()

    def publish(self) -> None:
        """Give a result that is all on disk its name.

        Raises:
            OutputError: OUT_DIR can't be replaced.
        """
        with file_failures(self.place.out_dir):
            kept = {path.split("/")[0] for path in self._job.files or ()}
            empty_work(self.work_dir, keep=tuple(kept))
            if self._job.old_files is None:
                check_target(self.place)
            publish(self.place, self._job)


def _key(name: str, draft: str | None = None) -> str:
    """Return under which name something is spooled; no tensor's has a space."""
    return name if draft is None else f"{draft} of {name}"


def _check_same(job: Job, fingerprint: Mapping[str, Any], work_dir: Path) -> None:
    keys = {*job.fingerprint, *fingerprint}
    changed = sorted(key for key in keys if job.fingerprint.get(key) != fingerprint.get(key))
    if changed:
        raise OutputError(
            f"{work_dir} was started with another {' and '.join(changed)}; "
            "resuming would mix two runs. Start over with --overwrite."
        )
