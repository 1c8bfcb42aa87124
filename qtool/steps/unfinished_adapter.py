"""How far the training of an adapter is, so that a run that was stopped goes on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from qtool.checkpoint.adapter_files import (
    CURVE_NAME,
    JOB_NAME_OF_ADAPTER,
    STATE_NAME,
    WORK_FILES,
    check_adapter_place,
    empty_adapter,
    replace_adapter,
)
from qtool.checkpoint.claim import let_go, made_and_locked
from qtool.checkpoint.place import Place, file_failures
from qtool.errors import OutputError
from qtool.storage.plain_json import json_text, write_json_file
from qtool.storage.whole_files import written_whole
from qtool.training.schedule import Point

RUN_MARK = "an unfinished adapter of qtool"


class UnfinishedAdapter:
    """A folder that has how far a run is: its curve, and all that its next step depends on."""

    def __init__(self, directory: Path, job: Mapping[str, Any], lock: int) -> None:
        """Name the folder.

        Args:
            directory: The folder.
            job: What decides the result: an unfinished run goes on only for the same.
            lock: A descriptor of the folder, which keeps others away.
        """
        self.directory, self._lock = directory, lock
        self._job = json.loads(json_text({"this is": RUN_MARK, **job}))

    def kept_job(self) -> Mapping[str, Any] | None:
        """Return the job of what lies there; None: it isn't the work of such a run."""
        try:
            kept = json.loads((self.directory / JOB_NAME_OF_ADAPTER).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        return kept if isinstance(kept, dict) and kept.get("this is") == RUN_MARK else None

    def is_same(self) -> bool:
        """Return whether what lies there is of the same job."""
        return self.kept_job() == self._job

    def recall(self) -> tuple[Mapping[str, Tensor], Sequence[Point]] | None:
        """Return state and curve; None: there are none that are whole."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.directory / STATE_NAME, "pt") as file:
                lines = (file.metadata() or {})["curve"].splitlines()
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError):
            return None
        return state, [Point(**json.loads(line)) for line in lines]

    def keep(self, state: Mapping[str, Tensor], points: Sequence[Point]) -> None:
        """Take the place of what was kept before."""
        from safetensors.torch import save

        lines = "\n".join(json_text(asdict(point), indent=None) for point in points)
        found = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        job, target = self.directory / JOB_NAME_OF_ADAPTER, self.directory / STATE_NAME
        with file_failures(self.directory):
            if not job.exists():
                write_json_file(job, self._job)
            with written_whole(target, durable=True) as file:
                file.write(save(found, {"curve": lines}))

    def finish(self, directory: Path) -> None:
        """Give the adapter its name, then remove all that only serves to go on.

        Raises:
            OutputError: it can't be renamed.
        """
        replace_adapter(self.directory, directory)
        for name in WORK_FILES:
            (directory / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Let others write there; a folder without any work is removed."""
        let_go(self._lock, self.directory)

    def write_curve(self, points: Sequence[Point]) -> None:
        """Write the curve as JSON lines, as that of tuning a whole model."""
        values = ({"of": "model", **asdict(point)} for point in points)
        lines = "".join(json_text(value, indent=None) + "\n" for value in values)
        with file_failures(self.directory), written_whole(self.directory / CURVE_NAME) as file:
            file.write(lines.encode())


def open_unfinished(
    place: Place, job: Mapping[str, Any], *, overwrite: bool, resume: bool
) -> UnfinishedAdapter:
    """Return where the work on an adapter lies: new, or that of the same job that was stopped.

    Args:
        place: Of the adapter, and of the work on it.
        job: See `UnfinishedAdapter`.
        overwrite: What was begun is dropped.
        resume: It goes on.

    Raises:
        OutputError: one is there, and nobody said what is to become of it, or it is another job's,
            or another run is at work on it, or has finished one meanwhile.
    """
    folder = place.work_dir
    with file_failures(place.out_dir):
        lock = made_and_locked(folder, place, check=lambda: check_adapter_place(place))
        unfinished = UnfinishedAdapter(folder, job, lock)
        try:
            if any(folder.iterdir()):
                _check_unfinished(unfinished, overwrite=overwrite, resume=resume)
            if not resume:
                empty_adapter(folder)
        except BaseException:
            unfinished.close()
            raise
    return unfinished


def _check_unfinished(unfinished: UnfinishedAdapter, *, overwrite: bool, resume: bool) -> None:
    folder = unfinished.directory
    if unfinished.kept_job() is None:
        raise OutputError(
            f"{folder}, where the work would go, isn't the work of `qtool adapt`, and is left "
            "alone. Move it away, or name another ADAPTER_DIR."
        )
    if resume and not unfinished.is_same():
        raise OutputError(
            f"{folder} is the unfinished run of other options, data or another base. Start over "
            "with --overwrite."
        )
    if not (resume or overwrite):
        raise OutputError(
            f"{folder} holds an unfinished run. Continue it with --resume, or start over with "
            "--overwrite."
        )
