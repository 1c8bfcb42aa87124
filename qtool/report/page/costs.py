"""The section on what the run took: time by step and by kind of layer, memory."""

from collections import defaultdict

from qtool.report.lengths import Axes
from qtool.report.page.drawing import by_block, style_of
from qtool.report.page.evidence import Evidence
from qtool.report.page.parts import Absent, PageSection, PageTable, Part, Picture
from qtool.report.page.wordings import duration, place_of
from qtool.wording import gigabytes

_TITLE = "Time and memory"


def costs_section(evidence: Evidence) -> PageSection | Absent:
    """Return times and sizes."""
    report = evidence.report
    rows = _totals(evidence)
    if not rows:
        return Absent(_TITLE, "quantization_report.json, which has it, is missing.")
    totals = PageTable(
        f"Of the run, on {report.get('device')}", ("what", ">time or memory"), tuple(rows)
    )
    parts: list[Part] = [totals]
    timed = [layer for layer in evidence.layers if layer.get("seconds")]
    by_kind: dict[str, float] = defaultdict(float)
    by_block: dict[int, float] = defaultdict(float)
    for layer in timed:
        block, kind = place_of(layer["name"])
        by_kind[kind] += layer["seconds"]
        if block is not None:
            by_block[block] += layer["seconds"]
    if len(by_block) > 1:
        parts.append(_over_blocks(dict(sorted(by_block.items()))))
    whole = sum(by_kind.values())
    cells = tuple(
        (kind, duration(seconds), f"{seconds / whole:.0%}") for kind, seconds in by_kind.items()
    )
    if cells:
        columns = ("kind of layer", ">time of solving", ">share")
        parts.append(PageTable("Solving, by kind of layer", columns, cells))
    return PageSection(_TITLE, tuple(parts))


def _totals(evidence: Evidence) -> list[tuple[str, str]]:
    report, rows = evidence.report, []
    steps = evidence.verdict.get("seconds") or {}
    if report.get("seconds") is not None:
        rows.append(("quantizing, from begin to end", duration(report["seconds"])))
    rows += [
        (f"step {name}", duration(spent)) for name, spent in steps.items() if name != "quantize"
    ]
    if report.get("peak_memory_bytes") is not None:
        device = report.get("device")
        what = "memory of the process" if device == "cpu" else "memory of the card"
        rows.append((f"peak {what}", gigabytes(report["peak_memory_bytes"])))
    for key, what in (("weight_bytes", "weights, written"), ("source_bytes", "weights, read")):
        if report.get(key) is not None:
            rows.append((what, gigabytes(report[key])))
    return rows


def _over_blocks(seconds: dict[int, float]) -> Picture:
    def paint(axes: Axes) -> None:
        axes.plot(list(seconds), list(seconds.values()), **style_of(0))
        axes.set_ylim(0, 1.08 * max(seconds.values()))
        axes.set_ylabel("time of solving, s")
        by_block(axes)

    slowest = max(seconds, key=seconds.__getitem__)
    words = (
        f"Solving took {duration(sum(seconds.values()))}, most of it in block {slowest}: "
        f"{duration(seconds[slowest])}."
    )
    return Picture("Time of solving over the blocks", words, paint)
