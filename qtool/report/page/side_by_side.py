"""The section that holds several runs against each other: a table and Pareto plots."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

from qtool.recipe.gates import ON_CHATS, ON_TEXT
from qtool.report.lengths import Axes
from qtool.report.page.drawing import INK, logarithmic, style_of
from qtool.report.page.evidence import Evidence
from qtool.report.page.parts import PageSection, PageTable, Part, Picture, Words
from qtool.report.page.wordings import duration, text_of
from qtool.wording import gigabytes

SIDE_BY_SIDE = "Side by side"
_ACROSS = (("decoder_bits", "bits per weight of the decoder"), ("megabytes", "size on disk, MB"))
_UP = (("kl_text", "divergence on text, nats per token"), ("perplexity", "perplexity per token"))
LONGEST_LABEL = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A run in the few numbers that are compared; None: not known."""

    name: str
    method: str
    decoder_bits: float | None = None
    strict_bits: float | None = None
    megabytes: float | None = None
    kl_text: float | None = None
    kl_chats: float | None = None
    perplexity: float | None = None
    seconds: float | None = None
    peak_bytes: float | None = None
    conditions: tuple[object, ...] = ()
    """What the quality holds for; only what is equal in this can be compared."""


def side_by_side_section(many: Sequence[Evidence]) -> PageSection:
    """Return a table of all runs, and what quality costs in bits and bytes."""
    standings = [standing(evidence) for evidence in many]
    parts: list[Part] = [PageTable("All runs", RUN_COLUMNS, tuple(map(_row, standings)))]
    if len({one.conditions for one in standings if one.conditions}) > 1:
        parts.append(
            Words(
                "Careful: these runs were measured on different texts or windows, so that their "
                "divergences and perplexities can't be compared. Evaluate all of them alike."
            )
        )
    for x, across in _ACROSS:
        for y, up in _UP:
            points = [
                (one.name, getattr(one, x), getattr(one, y))
                for one in standings
                if getattr(one, x) is not None and getattr(one, y) is not None
            ]
            if len(points) > 1:
                parts.append(_pareto(points, across, up))
    if len(parts) == 1:
        parts.append(Words("Fewer than two runs have both a size and a quality to be drawn."))
    return PageSection(SIDE_BY_SIDE, tuple(parts))


def standing(evidence: Evidence) -> Standing:
    """Return what is compared of a run; a sweep's own measurement where there is no other."""
    swept, sizes, manifest = evidence.swept, evidence.sizes, evidence.manifest
    text, chats = evidence.agreement(ON_TEXT), evidence.agreement(ON_CHATS)
    quality = (evidence.perplexities()[0] or {}).get("perplexity")
    disk = sizes.num_bytes if sizes is not None else swept.get("disk_bytes")
    weights = (manifest.recipe.get("weights") or {}) if manifest is not None else {}
    return Standing(
        name=evidence.name,
        method=str(weights.get("method", "")),
        decoder_bits=evidence.block_bits or swept.get("block_bits"),
        strict_bits=sizes.strict_bits if sizes is not None else swept.get("strict_bits"),
        megabytes=None if disk is None else disk / 1e6,
        kl_text=text.get("kl_divergence", swept.get("kl_text")),
        kl_chats=chats.get("kl_divergence", swept.get("kl_chats")),
        perplexity=swept.get("perplexity") if quality is None else quality,
        seconds=evidence.report.get("seconds"),
        peak_bytes=evidence.report.get("peak_memory_bytes"),
        conditions=tuple(text.get(key) for key in CONDITIONS) if text else (),
    )


CONDITIONS = ("dataset", "context_length", "positions")
RUN_COLUMNS = (
    *("run", "method", ">decoder, bits", ">strict, bits", ">size", ">KL, text, nats"),
    *(">KL, chats, nats", ">perplexity", ">quantized in", ">peak memory"),
)


def _row(one: Standing) -> tuple[str, ...]:
    def cell(value: float | None, shown: Callable[[float], str]) -> str:
        return "" if value is None else shown(value)

    return (
        one.name,
        one.method,
        cell(one.decoder_bits, "{:.2f}".format),
        cell(one.strict_bits, "{:.2f}".format),
        cell(one.megabytes, lambda size: gigabytes(1e6 * size)),
        cell(one.kl_text, "{:.4f}".format),
        cell(one.kl_chats, "{:.4f}".format),
        cell(one.perplexity, text_of),
        cell(one.seconds, duration),
        cell(one.peak_bytes, gigabytes),
    )


def front(points: Sequence[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """Return the points that no other beats in both numbers, from left to right."""
    best, found = float("inf"), []
    for point in sorted(points, key=lambda point: point[1:]):
        if point[2] < best:
            found.append(point)
            best = point[2]
    return found


def _pareto(points: Sequence[tuple[str, float, float]], across: str, up: str) -> Picture:
    finite = [point for point in points if all(map(isfinite, point[1:])) and point[2] > 0]
    on_front = front(finite)

    def paint(axes: Axes) -> None:
        line = [point[1:] for point in on_front]
        if len(line) > 1:
            axes.plot(*zip(*line, strict=True), color=INK, linewidth=0.8, linestyle=":")
        for number, (name, x, y) in enumerate(finite):
            look = {**style_of(number), "linestyle": "", "markersize": 7}
            label = name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}…"
            axes.plot([x], [y], label=label, **look)
        logarithmic(axes, "y")
        axes.set_xlabel(across)
        axes.set_ylabel(up)

    names = ", ".join(name for name, _, _ in on_front)
    words = f"No other run is both smaller and better than {names}, along the dotted line."
    return Picture(f"{up.split(',')[0].capitalize()} over {across}", words, paint)
