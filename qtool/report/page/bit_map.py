"""The section that shows where the bits are: blocks by kinds of layers, coloured by bits."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby

from qtool.checkpoint.kept_kinds import kept_kinds
from qtool.checkpoint.sizes import IN_A_BLOCK
from qtool.formats._dtypes import item_bytes
from qtool.report.page.evidence import Evidence
from qtool.report.page.parts import Absent, Cell, PageSection, PageTable, Words
from qtool.report.page.wordings import place_of, ranges

_TITLE = "Bits of each layer"
# viridis, which grows lighter evenly and which colour-blind readers can follow
SHADES = (
    *("#440154", "#46327e", "#365c8d", "#277f8e"),
    *("#1fa187", "#4ac16d", "#a0da39", "#fde725"),
)
WIDE = "#d0d7de"
"""Of what isn't quantized."""
BRIGHT = 0.179
"""Relative luminance above which black stands out more than white (WCAG 2.2)."""
Widths = tuple[int, ...]
Rows = tuple[tuple[str | Cell, ...], ...]


def bit_map_section(evidence: Evidence) -> PageSection | Absent:
    """Return a map of the blocks, whose equal neighbours share a row, and the bytes by kind."""
    if evidence.manifest is None or evidence.sizes is None:
        return Absent(_TITLE, "There is no checkpoint to look into.")
    blocks, others = _widths(evidence)
    parts: list[Words | PageTable] = [Words(_about(blocks))]
    if blocks:
        known = [place_of(name)[1] for name in evidence.manifest.layers]
        here = {kind: None for row in blocks.values() for kind in row}
        kinds = tuple(dict.fromkeys([*(kind for kind in known if kind in here), *here]))
        rows: Rows = tuple(
            (ranges(numbers), *(_cell(row.get(kind, ())) for kind in kinds))
            for row, numbers in _alike(blocks)
        )
        columns = ("block", *_short(kinds))
        parts.append(
            PageTable("Bits of the codes, by block and kind of layer", columns, rows, dense=True)
        )
    if others:
        beside: Rows = tuple((name, _cell(widths)) for name, widths in others.items())
        parts.append(PageTable("Outside of the blocks", ("layer", "bits"), beside, dense=True))
    parts.append(_bytes(evidence))
    kept = kept_kinds(evidence.manifest.unquantized)
    if kept:
        reasons: Rows = tuple((one.kind, str(len(one.names)), one.why) for one in kept)
        parts.append(PageTable("Not quantized", ("weights", ">tensors", "why"), reasons))
    return PageSection(_TITLE, tuple(parts))


def _short(kinds: Sequence[str]) -> list[str]:
    """Return the last words of names, where these tell them apart."""
    last = [kind.rpartition(".")[2] for kind in kinds]
    return [word if last.count(word) == 1 else kind for word, kind in zip(last, kinds, strict=True)]


def _about(blocks: dict[int, dict[str, Widths]]) -> str:
    return (
        f"{len(blocks)} blocks; neighbours that are alike share a row. Numbers are bits of a code; "
        "scales and offsets come on top. Grey cells hold numbers that aren't quantized."
    )


def _widths(evidence: Evidence) -> tuple[dict[int, dict[str, Widths]], dict[str, Widths]]:
    """Return the widths of each kind in each block, and of each matrix outside of them."""
    found: dict[str, set[int]] = {}
    assert evidence.manifest is not None
    for name, entry in evidence.manifest.layers.items():
        found[name] = set(entry.scheme.widths)
    for name, spec in evidence.unquantized.items():
        if len(spec.shape) > 1:
            found[name.removesuffix(".weight")] = {8 * item_bytes(spec.dtype)}
    blocks: dict[int, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    others: dict[str, Widths] = {}
    for name, widths in found.items():
        block, kind = place_of(name)
        if block is None or not IN_A_BLOCK.search(f".{name}."):
            others[name] = tuple(sorted(widths))
        else:
            blocks[block][kind] |= widths
    rows = {
        block: {kind: tuple(sorted(widths)) for kind, widths in row.items()}
        for block, row in sorted(blocks.items())
    }
    return rows, others


def _alike(
    blocks: dict[int, dict[str, Widths]],
) -> Iterable[tuple[dict[str, Widths], Sequence[int]]]:
    """Yield each row with the neighbouring blocks that have it."""
    for row, group in groupby(blocks, key=blocks.__getitem__):
        yield row, list(group)


def _cell(widths: Widths) -> Cell:
    if not widths:
        return Cell("")
    shade = WIDE if max(widths) > len(SHADES) else SHADES[round(sum(widths) / len(widths)) - 1]
    return Cell("/".join(map(str, widths)), shade, "#000000" if _is_bright(shade) else "#ffffff")


def _is_bright(color: str) -> bool:
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]  # noqa: PLR2004
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) > BRIGHT


def _bytes(evidence: Evidence) -> PageTable:
    assert evidence.sizes is not None
    rows = [
        (each.kind, f"{each.num_weights:,}", f"{each.num_bytes / 1e6:,.2f}", f"{each.bits:.2f}")
        for each in evidence.sizes.kinds
    ]
    headers = evidence.sizes.header_bytes / 1e6
    rows.append(("names and shapes in the files", "", f"{headers:,.2f}", ""))
    total = evidence.sizes.num_bytes / 1e6, evidence.sizes.strict_bits
    rows.append(("all", f"{evidence.sizes.num_weights:,}", f"{total[0]:,.2f}", f"{total[1]:.2f}"))
    columns = ("what is stored", ">weights", ">MB on disk", ">bits per weight")
    return PageTable("Bytes by what they are for", columns, tuple(rows))
