"""The one picture of `qtool calibrate`: lengths that were drawn beside those asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtool.data.lengths import bin_edges, histogram, quantiles
from qtool.errors import MissingExtraError, OutputError
from qtool.storage.whole_files import written_over
from qtool.wording import reason

Axes = Any  # of matplotlib
NUM_BINS = 24


def draw_lengths(path: Path, used: Sequence[int], requested: Sequence[int] = ()) -> None:
    """Write both histograms of lengths in tokens as shares, in outlines: neither hides the other.

    Raises as `new_axes` and `save_plot`.
    """
    axes = new_axes(path)
    edges = bin_edges([*used, *requested], NUM_BINS)
    for lengths, label, color, style in (
        (requested, "requested", "tab:orange", "--"),
        (used, "used", "tab:blue", "-"),
    ):
        if lengths:
            text = f"{label}: {describe_lengths(lengths)}"
            shares = histogram(lengths, edges)
            axes.stairs(shares, edges, label=text, color=color, linestyle=style, linewidth=1.5)
    axes.set_xlim(0, 1.05 * edges[-1])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("length in tokens")
    axes.set_ylabel("share of samples")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    save_plot(axes, path, legend="outside upper left")


def describe_lengths(lengths: Sequence[int]) -> str:
    """Return the quantiles in words."""
    low, middle, high = quantiles(lengths)
    return f"median {middle}, p10 {low}, p90 {high}"


def new_axes(path: Path, size: tuple[float, float] = (6.4, 3.6)) -> Axes:
    """Return the axes of a new figure of `size` inches, without pyplot: no window or global state.

    Raises:
        MissingExtraError: matplotlib isn't installed.
    """
    return new_panels(path, size, (1, 1))[0]


def new_panels(path: Path, size: tuple[float, float], grid: tuple[int, int]) -> list[Axes]:
    """Return the axes of a new figure with (rows, columns) of them, row by row; as `new_axes`."""
    try:
        import matplotlib.figure
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise MissingExtraError(path.name, "report") from None
    figure = matplotlib.figure.Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(*grid, place + 1) for place in range(grid[0] * grid[1])]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return panels


def save_plot(axes: Axes, path: Path, *, legend: str) -> None:
    """Write a picture; its suffix says in which format, `legend` where the legend is.

    Raises:
        OutputError: the file can't be written.
    """
    axes.figure.legend(loc=legend, frameon=False, fontsize="small")
    try:
        with written_over(path) as file:
            axes.figure.savefig(file, format=path.suffix.removeprefix("."))
    except OSError as error:
        raise OutputError(f"Can't write {path}: {reason(error)}.") from error
