"""The section that says in a minute what came out."""

from collections.abc import Iterator, Sequence

from qtool.recipe.gates import ON_CHATS, ON_TEXT
from qtool.report.page.evidence import Evidence, Facts
from qtool.report.page.parts import Absent, KeyNumbers, PageSection, PageTable, Part, Words
from qtool.report.page.wordings import duration, interval, text_of
from qtool.wording import gigabytes

_TITLE = "Summary"
Tile = tuple[str, str, str]


def summary_section(evidence: Evidence) -> PageSection | Absent:
    """Return the figures that matter most, and how the run was judged."""
    tiles = [*_sizes(evidence), *_quality(evidence), *_costs(evidence)]
    if not tiles:
        return Absent(_TITLE, "There is no checkpoint and nothing was measured.")
    gates = evidence.verdict.get("gates") or ()
    parts: list[Part] = [*_about(evidence), KeyNumbers((*_judged(gates), *tiles))]
    if gates:
        columns = ("gate", "result", "limit", ">value", ">margin")
        parts.append(PageTable("Gates of the recipe", columns, tuple(map(_gate, gates))))
    return PageSection(_TITLE, tuple(parts))


def _about(evidence: Evidence) -> Iterator[Words]:
    """Yield what was made of what, in a sentence."""
    manifest = evidence.manifest
    if manifest is None:
        return
    methods = sorted({entry.method for entry in manifest.layers.values()})
    said = str(manifest.recipe.get("description") or "")
    yield Words(
        f"{manifest.source or 'A local model'}: {len(manifest.layers)} layers quantized by "
        f"{', '.join(methods)}. {said}"
    )


def _judged(gates: Sequence[Facts]) -> Iterator[Tile]:
    if gates:
        failed = sum(not gate["passed"] for gate in gates)
        yield "gates", f"{failed} of {len(gates)} failed" if failed else "all passed", ""


def _sizes(evidence: Evidence) -> list[Tile]:
    tiles = []
    sizes, manifest, report = evidence.sizes, evidence.manifest, evidence.report
    if manifest is not None:
        bits = manifest.average_bits()
        tiles.append(("bits per quantized weight", f"{bits:.2f}", "with scales and offsets"))
    if sizes is not None:
        tiles.append(
            ("bits per weight, strict", f"{sizes.strict_bits:.2f}", "all bytes on disk counted")
        )
        source = report.get("source_bytes")
        share = f"{sizes.num_bytes / source:.0%} of {gigabytes(source)}" if source else ""
        tiles.append(("size on disk", gigabytes(sizes.num_bytes), share))
    return tiles


def _quality(evidence: Evidence) -> list[Tile]:
    tiles = []
    result, original = evidence.perplexities()
    if result is not None:
        beside = f"original {text_of(original.get('perplexity'))}" if original else ""
        tiles.append(("perplexity", text_of(result.get("perplexity")), beside))
    for what in (ON_TEXT, ON_CHATS):
        found = evidence.agreement(what)
        if found:
            value = interval(found["kl_divergence"], found["kl_standard_error"])
            tiles.append((f"KL to the original, {what}", value, "nats per token"))
    return tiles


def _costs(evidence: Evidence) -> list[Tile]:
    report, tiles = evidence.report, []
    if report.get("seconds") is not None:
        tiles.append(("quantized in", duration(report["seconds"]), f"on {report.get('device')}"))
    if report.get("peak_memory_bytes") is not None:
        tiles.append(("peak memory", gigabytes(report["peak_memory_bytes"]), "while quantizing"))
    return tiles


def _gate(gate: Facts) -> tuple[str, ...]:
    sign = "at least" if gate["at_least"] else "at most"
    unit = f" {gate['unit']}" if gate["unit"] else ""
    note = f": {gate['note']}" if gate["note"] else ""
    return (
        str(gate["name"]),
        ("passed" if gate["passed"] else "FAILED") + note,
        f"{sign} {text_of(gate['limit'])}{unit}",
        text_of(gate["value"]),
        text_of(gate["margin"], "+"),
    )
