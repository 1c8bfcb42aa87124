"""The section on what didn't go as asked: fallbacks, warnings, layers worse than rounding."""

from collections.abc import Iterator

from qtool.report.page.evidence import Evidence
from qtool.report.page.parts import MOST_ROWS, Absent, Lines, PageSection, PageTable, Part, Words
from qtool.report.page.wordings import scientific

_TITLE = "Fallbacks and warnings"


def cautions_section(evidence: Evidence) -> PageSection | Absent:
    """Return all that a reader of the numbers should know, or that there is nothing."""
    if not evidence.report:
        return Absent(_TITLE, "quantization_report.json, which has them, is missing.")
    parts = list(_parts(evidence))
    return PageSection(
        _TITLE, tuple(parts) or (Words("No layer fell back, and nothing was warned of."),)
    )


def _parts(evidence: Evidence) -> Iterator[Part]:
    check = evidence.report.get("check") or {}
    if check.get("failed"):
        yield Words("The check after writing has failed:")
        yield Lines(tuple(check["failed"]))
    fallen = [layer for layer in evidence.layers if layer.get("fallback")]
    if fallen:
        title = f"Layers that were solved more simply than asked ({len(fallen)})"
        why = tuple((layer["name"], str(layer["fallback"])) for layer in fallen[:MOST_ROWS])
        yield PageTable(title, ("layer", "why"), why)
    worse = [
        layer
        for layer in evidence.layers
        if (layer.get("output_error") or 0) > (layer.get("output_error_rounded") or float("inf"))
    ]
    if worse:
        title = f"Layers that are worse than rounding on held-out samples ({len(worse)})"
        rows = tuple(
            (one["name"], scientific(one["output_error_rounded"]), scientific(one["output_error"]))
            for one in worse[:MOST_ROWS]
        )
        yield PageTable(title, ("layer", ">rounded", ">as solved"), rows)
    notices = evidence.report.get("notices") or ()
    if notices:
        more = len(notices) - MOST_ROWS
        lines = (*notices[:MOST_ROWS], *((f"and {more} more",) if more > 0 else ()))
        yield Words("Warnings of the run:")
        yield Lines(tuple(map(str, lines)))
    missing = (evidence.report.get("calibration") or {}).get("special tokens missing")
    if missing:
        tokens = ", ".join(map(str, missing))
        yield Words(f"Special tokens that are in no calibration sample: {tokens}.")
