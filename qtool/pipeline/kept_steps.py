"""Results of the steps of a run, each kept as JSON with all that decided it."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.errors import DataError
from qtool.storage.digests import files_digest
from qtool.storage.plain_json import plain_json, write_json_file
from qtool.wording import reason

StepResult = Mapping[str, Any]
"""As JSON has it."""


@dataclass(frozen=True, slots=True)
class KeptStep:
    """What a step has found out."""

    result: StepResult
    seconds: float
    is_reused: bool
    """An earlier run left it."""


@dataclass(frozen=True, slots=True)
class KeptSteps:
    """A folder with a file for each step."""

    folder: Path

    def once(self, name: str, made_of: Mapping[str, Any], make: Callable[[], Any]) -> KeptStep:
        """Return what an earlier run has kept that was made of the same, else make and keep it.

        Args:
            name: Of the step, and of its file.
            made_of: All that decides the result.
            make: Called if there is no such result; a result with `failures` is made anew the next
                time.

        Raises:
            OSError: it can't be written.
        """
        made_of = plain_json(made_of)
        kept = _read(self.folder / f"{name}.json")
        if kept is not None and kept["made of"] == made_of and not kept["result"].get("failures"):
            return KeptStep(kept["result"], kept["seconds"], is_reused=True)
        started = time.perf_counter()
        result = plain_json(make())
        seconds = time.perf_counter() - started
        self.folder.mkdir(exist_ok=True)
        values = {"made of": made_of, "seconds": seconds, "result": result}
        write_json_file(self.folder / f"{name}.json", values)
        return KeptStep(result, seconds, is_reused=False)


def contents_of(*places: str | Path | None) -> Mapping[str, str]:
    """Return what tells the files that a step reads from others of the same names.

    Args:
        places: Texts and folders of data; names of what is bundled have no file, and are a
            version's.

    Raises:
        DataError: one can't be read.
    """
    found = {}
    for path in (Path(place) for place in places if place is not None):
        try:
            files = [one for one in (path, *sorted(path.rglob("*"))) if one.is_file()]
            if files:
                found[str(path)] = files_digest(files)
        except OSError as error:
            raise DataError(f"{path} can't be read: {reason(error)}.") from error
    return found


def _read(path: Path) -> dict[str, Any] | None:
    """Return what is kept; None: nothing, or it is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(values["result"], dict) and isinstance(values["seconds"], float)
        return values if whole and "made of" in values else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
