"""The section on the samples: which texts, how long, which special tokens."""

from collections.abc import Mapping
from itertools import pairwise
from statistics import median_low

from qtool.report.lengths import Axes
from qtool.report.page.drawing import SERIES
from qtool.report.page.evidence import Evidence, Facts
from qtool.report.page.parts import Absent, PageSection, PageTable, Part, Picture, Words

_TITLE = "Calibration data"
MOST_EXPERTS_NAMED = 3
"""Starved layers of a block that are named, with the tokens that they were solved for."""


def calibration_section(evidence: Evidence) -> PageSection | Absent:
    """Return sources, lengths and special tokens of the samples."""
    about: Facts = evidence.report.get("calibration") or {}
    if not about:
        return Absent(_TITLE, "No data were used, or quantization_report.json is missing.")
    parts: list[Part] = [
        Words(
            f"{about.get('dataset')}: {about.get('samples')} samples, {about.get('tokens'):,} "
            "tokens. The last samples are held out: errors are measured on these."
        )
    ]
    if about.get("sources"):
        columns = ("source", ">share of the tokens asked for", ">samples", ">tokens", "written as")
        rows = tuple(map(_source, about["sources"]))
        parts.append(PageTable("Sources of the samples", columns, rows))
    lengths = {
        what: found for what in ("requested", "used") if (found := about.get(f"{what} lengths"))
    }
    if lengths and all(found["p10"] == found["p90"] for found in lengths.values()):
        said = ", ".join(f"{what} {found['median']} tokens" for what, found in lengths.items())
        parts.append(Words(f"Samples are of one length: {said}."))
    elif lengths:
        parts.append(_lengths(lengths))
    special = about.get("special tokens") or {}
    if special:
        rows = tuple((token, f"{count:,}") for token, count in special.items())
        parts.append(PageTable("Special tokens in the samples", ("token", ">times"), rows))
    experts = evidence.report.get("experts") or {}
    if experts:
        heads = (
            "experts of",
            ">how many",
            ">fewest tokens",
            ">median",
            ">most",
            "starved layers",
        )
        found = tuple(_experts(*each) for each in experts.items())
        parts.append(PageTable("Calibration tokens that experts got", heads, found))
    return PageSection(_TITLE, tuple(parts))


def _experts(module: str, found: Facts) -> tuple[str, ...]:
    tokens, starved = found["tokens"], found["starved"]
    said = [f"{layer}: {chosen}" for layer, chosen in starved.items()]
    more = f" and {len(said) - MOST_EXPERTS_NAMED} more" if len(said) > MOST_EXPERTS_NAMED else ""
    counts = (len(tokens), min(tokens), median_low(tokens), max(tokens))
    return (
        module,
        *(f"{count:,}" for count in counts),
        ", ".join(said[:MOST_EXPERTS_NAMED]) + more,
    )


def _source(source: Facts) -> tuple[str, ...]:
    return (
        str(source["dataset"]),
        f"{source['share']:.0%}",
        str(source["samples"]),
        f"{source['tokens']:,}",
        str(source.get("as") or "it is"),
    )


def _lengths(lengths: Mapping[str, Facts]) -> Picture:
    said = [
        f"{what}: median {found['median']} tokens, 10th percentile {found['p10']}, 90th "
        f"{found['p90']}"
        for what, found in lengths.items()
    ]

    def paint(axes: Axes) -> None:
        for number, (what, found) in enumerate(lengths.items()):
            style = {"color": SERIES[1 - number], "linestyle": ("--", "-")[number]}
            shares = [100 * share for share in found["shares"]]
            axes.stairs(shares, found["edges"], label=what, linewidth=1.5, **style)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("length of a sample, tokens")
        axes.set_ylabel("share of the samples, %")

    edges = next(iter(lengths.values()))["edges"]
    width = max(high - low for low, high in pairwise(edges))
    title = f"Lengths of the samples, in steps of {width} tokens"
    return Picture(title, "; ".join(said) + ".", paint)
