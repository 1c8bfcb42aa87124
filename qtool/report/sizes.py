"""The picture of `qtool quantize --sweep`: what quality costs, in bits and in bytes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qtool.report.lengths import new_panels, save_plot

MEGABYTE = 1e6


@dataclass(frozen=True, slots=True)
class MeasuredSize:
    """One of several sizes of a model, and how good it is."""

    name: str
    """Of its directory."""
    uniform: bool
    """All layers have the same bits."""
    block_bits: float
    """Stored bits per weight of the matrices of the blocks."""
    strict_bits: float
    """Of all bytes on disk, per value of the original."""
    disk_bytes: int
    kl_text: float
    """To the original, in nats per token."""
    kl_chats: float | None
    perplexity: float
    on_front: bool = False
    """No other of at most its size is as close to the original on the text."""


def with_front(sizes: Sequence[MeasuredSize]) -> tuple[MeasuredSize, ...]:
    """Return the same by size, each with whether another is both smaller and closer."""
    ordered = sorted(sizes, key=lambda size: (size.disk_bytes, size.kl_text))
    best, found = float("inf"), []
    for size in ordered:
        found.append(replace(size, on_front=size.kl_text < best))
        best = min(best, size.kl_text)
    return tuple(found)


Value = Callable[[MeasuredSize], float | None]
ACROSS: tuple[tuple[str, Value], ...] = (
    ("bits per weight of the blocks", lambda size: size.block_bits),
    ("MB on disk", lambda size: size.disk_bytes / MEGABYTE),
)
UP: tuple[tuple[str, tuple[tuple[str, Value, str], ...]], ...] = (
    (
        "KL to the original",
        (
            ("text", lambda size: size.kl_text, "tab:blue"),
            ("chats", lambda size: size.kl_chats, "tab:orange"),
        ),
    ),
    ("perplexity", (("", lambda size: size.perplexity, "tab:blue"),)),
)


def draw_sizes(path: Path, sizes: Sequence[MeasuredSize]) -> None:
    """Write divergence and perplexity over bits of the blocks, and over bytes on disk.

    Chosen bits are solid, uniform ones dashed. Raises as `new_axes` and `save_plot`.
    """
    panels = new_panels(path, (9.0, 6.4), (len(UP), len(ACROSS)))
    labels = [(up, across) for up in UP for across in ACROSS]
    for axes, ((up, series), (across, x_of)) in zip(panels, labels, strict=True):
        for what, y_of, color in series:
            for uniform in (False, True):
                points = [(x_of(size), y_of(size)) for size in sizes if size.uniform is uniform]
                known = sorted((x, y) for x, y in points if x is not None and y is not None)
                if not known:
                    continue
                label = f"{what}, {'uniform' if uniform else 'chosen'}" if what else None
                style = "x--" if uniform else "o-"
                named = label if axes is panels[0] else None
                axes.plot(*zip(*known, strict=True), style, color=color, label=named, linewidth=1)
        axes.set_yscale("log")
        axes.set_xlabel(across)
        axes.set_ylabel(up)
    save_plot(panels[0], path, legend="outside upper center")
