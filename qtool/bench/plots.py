"""The roofline of `qtool bench --gpu`: what each kernel reaches of the copy bandwidth."""

from collections.abc import Iterator
from pathlib import Path

from qtool.bench.gpu import GpuResult
from qtool.bench.kernels import KernelRow
from qtool.errors import MissingExtraError, OutputError
from qtool.wording import reason

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
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError(path.name, "report") from None
    if not path.resolve().parent.is_dir():
        raise OutputError(f"Can't write {path}: no directory {path.resolve().parent}.")


def draw_roofline(path: Path, result: GpuResult) -> None:
    """Write GB/s over the bytes of a weight; the suffix says in which format.

    Raises:
        MissingExtraError: matplotlib isn't installed.
        OutputError: the file can't be written.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot: no window, no global state
    axes = figure.add_subplot()
    roof = result.copy_gb_per_second
    axes.axhline(roof, color="black", linestyle="--", linewidth=1, label=f"copy: {roof:,.0f} GB/s")
    others = iter(OTHER_STYLES * 4)
    for label, points in series(result).items():
        color, marker = STYLES.get(label) or next(others)
        own = label.startswith("qtool")
        axes.scatter(
            [row.weight_bytes / 1e6 for _, row in points],
            [row.gb_per_second for _, row in points],
            label=label,
            color=color,
            marker=marker,
            edgecolors="black",
            linewidths=0.5,
            s=55 if own else 30,
            zorder=3 if own else 2,
        )
        for name, row in points if own else ():
            axes.annotate(
                name,
                (row.weight_bytes / 1e6, row.gb_per_second),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                fontsize="x-small",
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0, 1.08 * max([roof, *(row.gb_per_second for _, row in _rows(result))]))
    axes.set_xlabel("weights, scales and offsets of a layer in MB")
    axes.set_ylabel("GB/s of these at one token")
    axes.set_title(f"{result.name} on {result.machine.card}", loc="left", fontsize="medium")
    axes.grid(which="major", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    try:
        figure.savefig(path)
    except OSError as error:
        raise OutputError(f"Can't write {path}: {reason(error)}.") from error


def series(result: GpuResult) -> dict[str, list[tuple[str, KernelRow]]]:
    """Return the points (layer, row) of each kernel, ours by the kernel that ran."""
    found: dict[str, list[tuple[str, KernelRow]]] = {}
    for name, row in _rows(result):
        label = f"{row.what} {row.kernel}".strip()
        found.setdefault(label, []).append((name, row))
    return found


def _rows(result: GpuResult) -> Iterator[tuple[str, KernelRow]]:
    for layer in result.layers:
        for row in layer.rows:
            yield layer.name, row
