"""The section on what gradients gained."""

from typing import Any

from qtool.report.lengths import Axes
from qtool.report.page.drawing import INK, SERIES, thinned
from qtool.report.page.evidence import Evidence
from qtool.report.page.parts import Absent, PageSection, PageTable, Part, Picture
from qtool.report.page.wordings import text_of

_TITLE = "Tuning"
LOSS_UNITS = {
    "blocks": "error of their outputs, share",
    "model": "KL to the original, nats per token",
}


def tuning_section(evidence: Evidence) -> PageSection | Absent:
    """Return held-out losses before and after, and their curves."""
    gains = evidence.report.get("tuning") or {}
    parts: list[Part] = []
    if gains:
        rows = tuple(
            (
                what,
                LOSS_UNITS.get(what, ""),
                text_of(before),
                text_of(after),
                f"{after / before - 1:+.1%}",
            )
            for what, (before, after) in gains.items()
        )
        columns = ("what was tuned", "loss on held-out samples", ">before", ">after", ">change")
        parts.append(PageTable("What tuning gained", columns, rows))
    curves = {what: points for what, points in evidence.curves.items() if len(points) > 1}
    if curves:
        parts.append(_curves(curves))
    if not parts:
        return Absent(_TITLE, "Nothing was tuned: see `qtool quantize --tune`.")
    return PageSection(_TITLE, tuple(parts))


def _curves(curves: dict[str, Any]) -> Picture:
    """Draw each loss as a share of what it was: blocks and model have other units."""
    shares = {
        what: thinned([(step, 100 * loss / (points[0][1] or 1.0)) for step, loss in points])
        for what, points in curves.items()
    }
    blocks = [what for what in shares if what != "model"]

    def paint(axes: Axes) -> None:
        for number, what in enumerate(blocks):
            label = {0: "first block", len(blocks) - 1: "last block"}.get(number)
            shade = 0.35 + 0.65 * (number + 1) / len(blocks)  # the first is pale
            look = {"color": SERIES[0], "alpha": shade, "linewidth": 1}
            axes.plot(*zip(*shares[what], strict=True), label=label, **look)
        if "model" in shares:
            look = {"color": SERIES[1], "linewidth": 2, "linestyle": "--"}
            axes.plot(*zip(*shares["model"], strict=True), label="model", **look)
        axes.axhline(100, color=INK, linestyle=":", linewidth=0.6)
        axes.set_xlabel("steps of the optimizer")
        axes.set_ylabel("held-out loss, % of the first")

    lowest = {what: min(share for _, share in points) for what, points in shares.items()}
    best, least = (pick(lowest, key=lowest.__getitem__) for pick in (min, max))
    words = (
        f"The lowest of each curve: from {lowest[best]:.0f} % ({best}) to {lowest[least]:.0f} % "
        f"({least}) of the first."
    )
    return Picture("Held-out loss over the steps of tuning", words, paint)
