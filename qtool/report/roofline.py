"""The roofline of `qtool bench --gpu`: what each kernel reaches of the copy bandwidth."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from qtool.errors import OutputError
from qtool.report.lengths import Axes, new_axes, save_plot
from qtool.timing.gpu import GpuResult
from qtool.timing.kernels import KernelRow

# Okabe and Ito's colours, which colour-blind readers tell apart; shapes tell them apart in grey.
STYLES = {
    "qtool planes": ("#0072B2", "o"),
    "qtool lut": ("#56B4E9", "v"),
    "qtool dequantize": ("#CC79A7", "D"),
    "qtool sign_flip": ("#009E73", "P"),
    "fp16 cuBLAS": ("#000000", "s"),
}
OTHER_STYLES = (
    ("#D55E00", "^"),
    ("#E69F00", "<"),
    ("#F0E442", ">"),
    ("#999999", "X"),
    ("#7F3C8D", "h"),
    ("#666666", "d"),
)


def check_plot(path: Path) -> None:
    """Find out before a long run that its plot could not be drawn.

    Raises:
        MissingExtraError: matplotlib isn't installed.
        OutputError: there is no such directory.
    """
    new_axes(path)
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise OutputError(f"Can't write {path}: no directory {folder}.")


def draw_roofline(path: Path, result: GpuResult) -> None:
    """Write GB/s over the bytes of a weight; raises as `new_axes` and `save_plot`."""
    axes = new_axes(path, (8.0, 4.5))
    roof = result.copy_gb_per_second
    axes.axhline(roof, color="black", linestyle="--", linewidth=1, label=f"copy: {roof:,.0f} GB/s")
    others, highest = iter(OTHER_STYLES * 4), roof
    for label, points in series(result).items():
        highest = max(highest, *(row.gb_per_second for _, row in points))
        color, marker = STYLES.get(label) or next(others)
        _draw_points(axes, label, points, {"color": color, "marker": marker})
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0, 1.08 * highest)
    axes.set_xlabel("weights, scales and offsets of a layer in MB")
    axes.set_ylabel("GB/s of these at one token")
    axes.set_title(f"{result.name} on {result.machine.card}", loc="left", fontsize="medium")
    axes.grid(which="major", linewidth=0.3)
    save_plot(axes, path, legend="outside right upper")


def _draw_points(
    axes: Axes,
    label: str,
    points: Sequence[tuple[str, KernelRow]],
    style: Mapping[str, str],
) -> None:
    """Draw the points of one kernel; ours are larger, in front, and named."""
    own = label.startswith("qtool")
    at = [(row.weight_bytes / 1e6, row.gb_per_second) for _, row in points]
    size, order = (55, 3) if own else (30, 2)
    edge = {"edgecolors": "black", "linewidths": 0.5}
    axes.scatter(*zip(*at, strict=True), label=label, s=size, zorder=order, **edge, **style)
    words = {"textcoords": "offset points", "ha": "center", "fontsize": "x-small"}
    for (name, _), place in zip(points, at, strict=True) if own else ():
        axes.annotate(name, place, xytext=(0, 6), **words)


def series(result: GpuResult) -> dict[str, list[tuple[str, KernelRow]]]:
    """Return the points (layer, row) of each kernel, ours by the kernel that ran."""
    found: dict[str, list[tuple[str, KernelRow]]] = {}
    for layer in result.layers:
        for row in layer.rows:
            label = f"{row.what} {row.kernel}".strip()
            found.setdefault(label, []).append((layer.name, row))
    return found
