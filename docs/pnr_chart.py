"""docs/images/pnr.svg: loss against the period p, from the numbers in docs/pnr.json."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

NUMBERS = Path(__file__).with_name("pnr.json")
PANELS: dict[str, tuple[str, dict[float, str]]] = {
    "quantize": ("quantized", {3: "3 bits", 2: "2 bits", 1: "1 bit"}),
    "decay": ("weight decay of a step", {1e-4: "0.0001", 1e-3: "0.001", 5e-3: "0.005"}),
    "prune": ("pruned", {0.7: "70 %", 0.9: "90 %", 0.95: "95 %"}),
}
"""By kind: its title, and what its strengths are called, weak ones first."""
COLOURS = ("#4477aa", "#228833", "#cc3311")
WIDTH, HEIGHT, LEFT, TOP, ROOM = 240, 190, 46, 34, 84
"""Of a panel in pixels; before the first one; above; from one to the next, for its labels."""
MOST_PERIOD, TICKS = 300, (1, 10, 100, 300)
LOSSES = (0.1, 0.2, 0.5, 1.0, 2.0)
LEAST, MOST = 0.09, 2.3


def chart() -> str:
    """Return the chart as SVG: three panels, a line for each strength, errors as bars."""
    rows = json.loads(NUMBERS.read_text(encoding="utf-8"))
    size = LEFT + len(PANELS) * (WIDTH + ROOM), TOP + HEIGHT + 46
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" '
        'font-family="sans-serif" font-size="12">',
        "<title>Cross entropy against the steps between two compressions</title>",
        f'<rect width="{size[0]}" height="{size[1]}" fill="white"/>',
    ]
    for number, kind in enumerate(PANELS):
        found = [row for row in rows if row["kind"] == kind]
        lines += _panel(kind, found, LEFT + number * (WIDTH + ROOM))
    return "\n".join([*lines, "</svg>"]) + "\n"


def _x(period: float, left: float) -> float:
    return left + WIDTH * math.log(period) / math.log(MOST_PERIOD)


def _y(loss: float) -> float:
    return TOP + HEIGHT * (1 - math.log(loss / LEAST) / math.log(MOST / LEAST))


def _panel(kind: str, rows: Sequence[Mapping[str, Any]], left: float) -> Iterator[str]:
    title, strengths = PANELS[kind]
    yield f'<text x="{left}" y="{TOP - 12}" font-weight="bold">{title}</text>'
    yield (
        f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>'
    )
    yield from _labels(left)
    places = _name_places(rows, strengths)
    for (strength, name), colour, at in zip(strengths.items(), COLOURS, places, strict=True):
        own = [row for row in rows if row["strength"] == strength]
        yield from _line(own, name, colour, left, at)


def _labels(left: float) -> Iterator[str]:
    bottom = TOP + HEIGHT
    for period in TICKS:
        x = _x(period, left)
        yield f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{period}</text>'
    yield f'<text x="{left + WIDTH / 2}" y="{bottom + 34}" text-anchor="middle">period p</text>'
    for loss in LOSSES:
        y = _y(loss)
        yield f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{loss:g}</text>'
        yield f'<path d="M{left} {y:.1f}h{WIDTH}" stroke="#ddd"/>'


def _name_places(rows: Sequence[Mapping[str, Any]], strengths: Iterable[float]) -> list[float]:
    """Return how far down names at the ends of lines stand, not on one another."""
    ends = [[_y(row["loss"]) for row in rows if row["strength"] == one][-1] for one in strengths]
    places, last = [0.0] * len(ends), math.inf
    for number in sorted(range(len(ends)), key=lambda n: -ends[n]):
        last = places[number] = min(ends[number] + 4, last - 13)
    return places


def _line(
    rows: Sequence[Mapping[str, Any]], name: str, colour: str, left: float, at: float
) -> Iterator[str]:
    points = [(_x(row["period"], left), _y(row["loss"])) for row in rows]
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    yield f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>'
    for (x, y), row in zip(points, rows, strict=True):
        above, below = _y(row["loss"] + row["error"]), _y(row["loss"] - row["error"])
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
        yield f'<path d="M{x:.1f} {above:.1f}V{below:.1f}" stroke="{colour}"/>'
    yield f'<text x="{left + WIDTH + 5}" y="{at:.1f}" fill="{colour}">{name}</text>'
