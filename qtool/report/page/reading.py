"""What runs have left in a directory, read without a demand: what is missing or damaged is told."""

import json
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qtool.checkpoint.marks import CONFIG_NAME, REPORT_NAME, RUN_FOLDER, is_checkpoint, read_report
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.sizes import sizes_of
from qtool.errors import OutputError, QtoolError
from qtool.modeling.digest import PATTERNS
from qtool.report.curves import read_curves
from qtool.report.page.evidence import Evidence, Facts
from qtool.report.trials import read_trials
from qtool.storage.plain_json import JsonValue
from qtool.wording import shown

_CURVES, _TRIALS, _SWEEP = "tuning.jsonl", "search.jsonl", "sweep.json"
MOST_RESULT_BYTES = 2**24
"""Of a file with measurements."""


def read_evidence(directory: Path, measured: Sequence[Path] = ()) -> Evidence:
    """Return what a directory says.

    Args:
        directory: Of a checkpoint, or of what was measured of one.
        measured: Results of `qtool eval --json` and `qtool bench --json` that lie elsewhere; they
            count more than those inside.

    Raises:
        OutputError: there is no such directory, or nothing of qtool's is in it; or one of the files
            isn't such a result.
    """
    if not directory.is_dir():
        raise OutputError(f"No directory {directory}. Give the OUT_DIR of a run.")
    fields: dict[str, Any] = {}
    gaps: list[str] = []
    for name, read in FILE_READERS.items():
        if (directory / name).is_file():
            try:
                fields |= read(directory)
            except QtoolError as error:
                gaps.append(f"{name} can't be used: {error}")
    for path in _candidates(directory):
        fields |= _recognized(_json(path))
    for path in measured:
        found = _recognized(_json(path))
        if not found:
            raise OutputError(
                f"{path} isn't a result of `qtool eval`, `qtool bench` or `qtool run` in JSON."
            )
        fields |= found
    if not any(fields.values()) and not gaps:
        raise OutputError(
            f"{directory} has nothing of a run: no {CONFIG_NAME} of qtool's, no {REPORT_NAME}, no "
            "measurement. Give the OUT_DIR of `qtool quantize` or `qtool run`."
        )
    return Evidence(name=shown(directory.resolve().name), gaps=gaps, **fields)


def swept(directory: Path) -> dict[Path, Facts]:
    """Return the directories of a sweep with what it measured of each; empty: it is none."""
    table = _json(directory / _SWEEP)
    sizes = table.get("sizes") if isinstance(table, dict) else None
    rows = [row for row in sizes or () if isinstance(row, dict)]
    named = {directory / Path(str(row.get("name"))).name: row for row in rows}
    return {path: row for path, row in named.items() if path.is_dir()}


def _checkpoint(directory: Path) -> dict[str, Any]:
    """Return what config.json and the headers of the weights say; nothing of a foreign model's."""
    if not is_checkpoint(directory):
        return {}
    reader = CheckpointReader(directory)
    names = [name for name in reader.names() if name not in reader.manifest.layers]
    return {
        "manifest": reader.manifest,
        "sizes": sizes_of(reader),
        "unquantized": {name: reader.spec(name) for name in names},
    }


FILE_READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    CONFIG_NAME: _checkpoint,
    REPORT_NAME: lambda directory: {"report": read_report(directory)},
    _CURVES: lambda directory: {"curves": read_curves(directory / _CURVES)},
    _TRIALS: lambda directory: {"trials": read_trials(directory / _TRIALS)},
}
"""Of the files of a run, by their names: each gives fields of the evidence."""


def _candidates(directory: Path) -> Iterator[Path]:
    """Yield files that may be measurements: those that lie there, then those of `qtool run`."""
    for folder in (directory, directory / RUN_FOLDER):
        for path in sorted(folder.glob("*.json")):
            own = path.name == REPORT_NAME or any(fnmatch(path.name, each) for each in PATTERNS)
            if not own and path.is_file() and path.stat().st_size <= MOST_RESULT_BYTES:
                yield path


def _json(path: Path) -> JsonValue:
    """Return what a JSON file holds; None: it isn't there, or is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _recognized(found: JsonValue) -> dict[str, Facts]:
    """Return which fields of the evidence a file fills, by the keys that it has."""
    if not isinstance(found, dict):
        return {}
    for wrapped in ("result", "kernels"):  # of a step of `qtool run`; of its bench on a card
        if isinstance(found.get(wrapped), dict):
            return _recognized(found[wrapped])
    for field, keys in RESULT_KEYS.items():
        if keys <= found.keys():
            return {field: found}
    figures = found.get("figures")
    listed = figures if isinstance(figures, list) else []
    parts = {"texts": "perplexity", "speeds": "speed"}
    return {
        field: found
        for field, key in parts.items()
        if any(isinstance(one, dict) and one.get(key) for one in listed)
    }


RESULT_KEYS = {
    "verdict": {"gates", "passed", "seconds"},
    "kernels": {"copy_gb_per_second", "layers"},
    "tasks": {"rows", "failures"},
}
"""What only results of one kind have, by the field of the evidence."""
