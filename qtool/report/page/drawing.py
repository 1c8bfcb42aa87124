"""Drawings for the page: SVG text that takes its colours from the page, the same bytes each time.

They are 4.8 inches wide, so that a telephone shows them at about their own size.
"""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from html import escape
from math import log10
from pathlib import Path
from typing import Any, Literal

from qtool.errors import MissingExtraError
from qtool.report.lengths import Axes, new_axes

SIZE = (4.8, 3.2)
"""In inches, 72 points each."""
LEGEND_ROW = 0.18
"""Inches that each further row of a legend adds."""
INK, LINE = "#f1e0f0", "#f1e0f1"
SERIES = tuple(f"#f1e00{number}" for number in range(1, 8))
"""Stand for colours of the style sheet, which has a set for a light page and one for a dark one."""
COLORS = {
    INK: "currentColor",
    LINE: "var(--line)",
    **{color: f"var(--s{number})" for number, color in enumerate(SERIES, 1)},
}
MOST_TICKS = 6
"""On a linear x axis: more would touch each other."""
LONGEST_UPRIGHT = 28
"""Letters of a label beside a y axis; the unit of a longer one goes on a line of its own."""
MOST_DECADES = {"x": 1.3, "y": 3.0}
"""Of an axis, as long as there is room for 2 and 5 between powers of ten."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
DRAWING_SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": LINE,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "axes.axisbelow": True,
}
METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def style_of(number: int) -> dict[str, Any]:
    """Return how the series of this number looks: colour, marker and dashes tell it from others."""
    return {
        "color": SERIES[number % len(SERIES)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number // len(SERIES) % len(DASHES)],
        "linewidth": 1.3,
        "markersize": 4,
    }


def by_block(axes: Axes) -> None:
    """Let an x axis count blocks."""
    axes.set_xlabel("number of the block")
    axes.xaxis.get_major_locator().set_params(integer=True)


def logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic if what is drawn spans a decade, with numbers that are one text."""
    low, high = getattr(axes.dataLim, f"interval{which}")
    if not 0 < 10 * low <= high:
        return
    axes.set(**{f"{which}scale": "log"})
    axis, labelled = getattr(axes, f"{which}axis"), log10(high / low) < MOST_DECADES[which]
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(
        lambda value, _: f"{value:g}" if labelled and f"{value:.0e}"[0] in "25" else ""
    )


def draw(key: str, title: str, paint: Callable[[Axes], None]) -> str:
    """Return a drawing as an SVG element whose ids begin with `key`.

    Its name for those who can't see it is the title, its description the element `key`-words.

    Args:
        key: Of letters, digits and dashes; no other drawing of the page has it.
        title: What is drawn, in a few words.
        paint: Is given matplotlib's axes; colours are those above, each axis gets its unit.

    Raises:
        MissingExtraError: matplotlib isn't installed.
    """
    try:
        from matplotlib import rc_context
    except ImportError:
        raise MissingExtraError("qtool report", "report") from None
    with rc_context({**DRAWING_SETTINGS, "svg.hashsalt": key}), warnings.catch_warnings():
        axes = new_axes(Path("report.html"), SIZE)
        axes.spines[["left", "bottom"]].set_color(LINE)
        warnings.simplefilter("ignore")  # of letters that its own font lacks, and the page's has
        paint(axes)
        if axes.get_xscale() == "linear":
            axes.locator_params(axis="x", nbins=MOST_TICKS)
        if len(axes.get_ylabel()) > LONGEST_UPRIGHT:
            axes.set_ylabel(axes.get_ylabel().replace(", ", ",\n"))
        labels = axes.get_legend_handles_labels()[1]
        if labels:  # below the drawing, where nothing lies under it
            longest = max(map(len, labels))
            columns = max(1, min(len(labels), 56 // (longest + 7)))
            rows = -(-len(labels) // columns)
            axes.figure.set_size_inches(SIZE[0], SIZE[1] + LEGEND_ROW * (rows - 1))
            axes.figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
        buffer = io.StringIO()
        axes.figure.savefig(buffer, format="svg", transparent=True, metadata=METADATA)
    element = _for_a_page(buffer.getvalue(), key)
    named = f'<svg role="img" aria-labelledby="{key}-title" aria-describedby="{key}-words"'
    begin, _, rest = element.replace("<svg", named, 1).partition(">")
    return f'{begin}><title id="{key}-title">{escape(title)}</title>{rest}'


def _for_a_page(svg: str, key: str) -> str:
    """Return the element alone: no namespaces, own ids, colours and fonts of the page."""
    text = svg[svg.index("<svg") :]
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text, count=2)
    text = re.sub(r'\s(width|height|version)="[^"]*"', "", text, count=3)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{key}-", text)
    text = re.sub(r"font: (?:\w+ )?([\d.]+px)[^;\"]*", r"font-size: \1", text)  # of 3.8
    text = re.sub(r"\s*font-family: [^;\"]*;?", "", text)
    text = re.sub(r"\s*<!--.*?-->", "", text, flags=re.DOTALL)
    for color, value in COLORS.items():
        text = text.replace(color, value)
    return text.strip()


def thinned(points: Sequence[tuple[float, float]], most: int = 200) -> list[tuple[float, float]]:
    """Return at most about `most` of the points, the last one among them."""
    step = -(-len(points) // most) or 1
    kept = list(points[::step])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]
