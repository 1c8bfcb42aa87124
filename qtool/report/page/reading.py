"""What runs have left in a directory, read without a demand: what is missing or damaged is told."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qtool.checkpoint.marks import CONFIG_NAME, REPORT_NAME, RUN_FOLDER, is_checkpoint, read_report
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.sizes import sizes_of
from qtool.errors import OutputError, QtoolError
from qtool.modeling.digest import PATTERNS
from qtool.report.curves import read_curves
from qtool.report.page.evidence import Evidence, Found
from qtool.report.trials import read_trials
from qtool.wording import shown

CURVES, TRIALS, SWEEP = "tuning.jsonl", "search.jsonl", "sweep.json"
MOST_BYTES = 2**24
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
    evidence = Evidence(name=shown(directory.resolve().name), report=read_report(directory))
    if is_checkpoint(directory):
        evidence = _with(evidence, "the checkpoint", lambda: _checkpoint(directory))
    for name, key, read in (
        (CURVES, "curves", read_curves),
        (TRIALS, "trials", read_trials),
    ):
        if (path := directory / name).is_file():
            evidence = _with(evidence, name, lambda path=path, key=key, read=read: {key: read(path)})
    for path in _candidates(directory):
        evidence = replace(evidence, **_recognized(_json(path)))
    for path in measured:
        found = _recognized(_json(path))
        if not found:
            raise OutputError(
                f"{path} isn't a result of `qtool eval --json`, `qtool bench --json` or `qtool run`."
            )
        evidence = replace(evidence, **found)
    if evidence == Evidence(name=evidence.name):
        raise OutputError(
            f"{directory} has nothing of a run: no {CONFIG_NAME} of qtool's, no {REPORT_NAME}, no "
            "measurement. Give the OUT_DIR of `qtool quantize` or `qtool run`."
        )
    return evidence


def swept(directory: Path) -> dict[Path, Found]:
    """Return the directories of a sweep with what it measured of each; empty: it is none."""
    table = _json(directory / SWEEP)
    sizes = table.get("sizes") if isinstance(table, dict) else None
    rows = [row for row in sizes or () if isinstance(row, dict)]
    named = {directory / Path(str(row.get("name"))).name: row for row in rows}
    return {path: row for path, row in named.items() if path.is_dir()}


def _with(evidence: Evidence, what: str, read: Callable[[], dict[str, Any]]) -> Evidence:
    """Add what can be read, else why it can't."""
    try:
        return replace(evidence, **read())
    except QtoolError as error:
        return replace(evidence, gaps=(*evidence.gaps, f"{what} can't be read: {error}"))


def _checkpoint(directory: Path) -> dict[str, Any]:
    reader = CheckpointReader(directory)
    names = [name for name in reader.names() if name not in reader.manifest.layers]
    return {
        "manifest": reader.manifest,
        "sizes": sizes_of(reader),
        "unquantized": {name: reader.spec(name) for name in names},
    }


def _candidates(directory: Path) -> Iterator[Path]:
    """Yield files that may be measurements: those that lie there, then those of `qtool run`."""
    for folder in (directory, directory / RUN_FOLDER):
        for path in sorted(folder.glob("*.json")):
            own = path.name == REPORT_NAME or any(fnmatch(path.name, each) for each in PATTERNS)
            if not own and path.is_file() and path.stat().st_size <= MOST_BYTES:
                yield path


def _json(path: Path) -> Any:  # noqa: ANN401
    """Return what a JSON file holds; None: it isn't there, or is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _recognized(found: Any) -> dict[str, Found]:  # noqa: ANN401
    """Return which fields of the evidence a file fills, by the keys that it has."""
    if not isinstance(found, dict):
        return {}
    if "made of" in found:  # of a step of `qtool run`
        return _recognized(found.get("result"))
    if "kernels" in found:
        return _recognized(found["kernels"])
    figures = found.get("figures")
    if {"gates", "passed", "seconds"} <= found.keys():
        return {"verdict": found}
    if "copy_gb_per_second" in found:
        return {"kernels": found}
    if isinstance(found.get("rows"), list) and "failures" in found:
        return {"tasks": found}
    if not isinstance(figures, list):
        return {}
    texts = any(isinstance(one, dict) and one.get("perplexity") for one in figures)
    speeds = any(isinstance(one, dict) and one.get("speed") for one in figures)
    return {
        **({"texts": found} if texts else {}),
        **({"speeds": found} if speeds else {}),
    }
