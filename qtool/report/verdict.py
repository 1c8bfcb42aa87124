"""The verdict on a run: each gate with its limit, value and margin; in Markdown and JUnit XML."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any
from xml.etree import ElementTree

from qtool.recipe.gates import EACH, GATE_OF, Gate, subjects
from qtool.recipe.schema import Recipe

SHOWN_WORSE = "worse"
"""The verdict of a paired test that a gate's `tested` asks for."""
Figures = Mapping[str, Any]
"""What a run has found out, as JSON has it: by measurement, then for some by subject."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateLine:
    """What became of one gate on one subject."""

    gate: str
    """Dotted key of the recipe, such as `gates.kl_mean` or `check.max_kl`."""
    of: str = ""
    """What it was read for; empty: there is one value."""
    limit: float
    at_least: bool = False
    value: float | None
    """None: it wasn't measured, which is a failure; `note` says why."""
    unit: str = ""
    passed: bool
    note: str = ""

    @property
    def name(self) -> str:
        """Return the key with what it was read for."""
        return f"{self.gate} ({self.of})" if self.of else self.gate

    @property
    def margin(self) -> float | None:
        """Return how far the value is from the limit, negative beyond it; None: no value."""
        if self.value is None:
            return None
        return self.value - self.limit if self.at_least else self.limit - self.value

    def cells(self) -> tuple[str, ...]:
        """Return name, limit, value, margin and result as people read them."""
        sign = "at least" if self.at_least else "at most"
        limit = f"{sign} {number_text(self.limit)}" + (f" {self.unit}" if self.unit else "")
        value = "not measured" if self.value is None else number_text(self.value)
        margin = "" if self.margin is None else number_text(self.margin, "+")
        result = "passed" if self.passed else "FAILED"
        return self.name, limit, value, margin, f"{result}: {self.note}" if self.note else result

    def sentence(self) -> str:
        """Return all of it on one line."""
        name, limit, value, margin, result = self.cells()
        return (
            f"{name}: {value}, {limit}" + (f", margin {margin}" if margin else "") + f": {result}"
        )


COLUMNS_OF_GATES = ("gate", ">limit", ">value", ">margin", "result")


def number_text(value: float, sign: str = "") -> str:
    """Return a number as people read it: whole ones in full, others with five digits."""
    return f"{value:{sign},.0f}" if value == int(value) else f"{value:{sign},.5g}"


def line_of(  # noqa: PLR0913 - what a line says
    gate: str,
    of: str,
    limit: float,
    value: float | None,
    *,
    at_least: bool = False,
    unit: str = "",
    note: str = "",
    excused: bool = False,
) -> GateLine:
    """Judge one value; one that isn't there, or isn't a number, fails."""
    if value is not None and not isfinite(value):
        value, note = None, note or "it isn't a number"
    within = value is not None and (value >= limit if at_least else value <= limit)
    return GateLine(
        gate=gate,
        of=of,
        limit=limit,
        at_least=at_least,
        value=value,
        unit=unit,
        passed=within or (excused and value is not None),
        note=note,
    )


def judge(recipe: Recipe, figures: Figures) -> tuple[GateLine, ...]:
    """Return a line per gate, and per subject where it is read for several.

    A number is the limit for all subjects that the recipe has measured; one that is missing fails.
    """
    lines: list[GateLine] = []
    for name, limit in recipe.gates.items():
        gate = GATE_OF[name]
        limits: dict[str, float]
        if isinstance(limit, Mapping):
            limits = dict(limit)
        else:
            assert limit is not None
            limits = dict.fromkeys(subjects(gate, recipe) or ("",), limit)
        for subject, number in limits.items():
            lines += _lines_of(gate, subject, number, figures)
    return tuple(lines)


def _lines_of(gate: Gate, subject: str, limit: float, figures: Figures) -> Iterator[GateLine]:
    """Yield a line for each value that a gate has for a subject; a task has one per metric."""
    settings: dict[str, Any] = {"at_least": gate.at_least, "unit": gate.unit}
    group, *_, key = gate.reads.split(".")
    found = figures.get(group) or {}
    if EACH not in gate.reads:
        note = "" if found.get(key) is not None else found.get("why") or "there is no such figure"
        yield line_of(f"gates.{gate.name}", "", limit, found.get(key), note=note, **settings)
        return
    entries: dict[str, Figures] = {
        of: one for of, one in found.items() if of.partition(" ")[0] == subject
    }
    for of, entry in (entries or {subject: {}}).items():
        value, verdict = entry.get(key), str(entry.get("verdict", ""))
        excused = gate.tested and verdict not in ("", SHOWN_WORSE)
        note = entry.get("why", "") if value is None else verdict
        note = note or ("" if value is not None else "there is no such figure")
        line = line_of(
            f"gates.{gate.name}", of, limit, value, note=note, excused=excused, **settings
        )
        yield line


def gates_markdown(title: str, lines: Sequence[GateLine], notes: Sequence[str] = ()) -> str:
    """Return a summary for people: the verdict, a table, what the numbers hold for."""
    failed = [line for line in lines if not line.passed]
    verdict = f"{len(failed)} of {len(lines)} gates failed" if failed else "passed"
    if not lines:
        verdict = "done, no gates"
    names = [name.removeprefix(">") for name in COLUMNS_OF_GATES]
    sides = ["---:" if name.startswith(">") else ":---" for name in COLUMNS_OF_GATES]
    rows = [f"| {' | '.join(_escaped(cell) for cell in line.cells())} |" for line in lines]
    table = ["", f"| {' | '.join(names)} |", f"| {' | '.join(sides)} |", *rows] if lines else []
    about = ["", *(f"- {_escaped(note)}" for note in notes)] if notes else []
    return "\n".join([f"- **{_escaped(title)}: {verdict}**", *table, *about])


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def gates_junit(title: str, lines: Sequence[GateLine], seconds: float) -> str:
    """Return a JUnit report: a test case per gate, as CI servers show it."""
    failures = sum(not line.passed for line in lines)
    counts = {"tests": str(len(lines)), "failures": str(failures), "errors": "0"}
    root = ElementTree.Element("testsuites", counts)
    time = {"time": f"{seconds:.3f}"}
    suite = ElementTree.SubElement(root, "testsuite", {"name": _plain(title), **counts, **time})
    for line in lines:
        about = {"classname": "qtool.gates", "name": _plain(line.name), "time": "0"}
        case = ElementTree.SubElement(suite, "testcase", about)
        text = _plain(line.sentence())
        if line.passed:
            ElementTree.SubElement(case, "system-out").text = text
        else:
            ElementTree.SubElement(case, "failure", {"message": text, "type": "gate"}).text = text
    ElementTree.indent(root)
    begin = '<?xml version="1.0" encoding="utf-8"?>\n'
    return begin + ElementTree.tostring(root, encoding="unicode")


def _plain(text: str) -> str:
    """Return a text without what XML can't hold."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
