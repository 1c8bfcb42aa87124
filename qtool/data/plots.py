"""The one picture of `qtool calibrate`: lengths that were drawn beside those asked for."""

from collections.abc import Sequence
from pathlib import Path

from qtool.data.lengths import bin_edges, histogram, quantiles
from qtool.errors import MissingExtraError, OutputError
from qtool.wording import reason

LENGTHS_NAME = "lengths.png"
NUM_BINS = 24


def draw_lengths(path: Path, used: Sequence[int], requested: Sequence[int] = ()) -> None:
    """Write both histograms as shares, outlined so that neither hides the other.

    Args:
        path: Of the `.png` file.
        used: Lengths of the samples.
        requested: Lengths that were to be matched; empty: nothing was, and nothing is drawn of it.

    Raises:
        MissingExtraError: matplotlib isn't installed.
        OutputError: the file can't be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError:
        raise MissingExtraError(path.name, "report") from None

    figure = Figure(figsize=(6.4, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot: no window, no global state
    axes = figure.add_subplot()
    edges = bin_edges([*used, *requested], NUM_BINS)
    for lengths, label, color, style in (
        (requested, "requested", "tab:orange", "--"),
        (used, "used", "tab:blue", "-"),
    ):
        if lengths:
            low, middle, high = quantiles(lengths)
            text = f"{label}: median {middle}, p10 {low}, p90 {high}"
            shares = histogram(lengths, edges)
            axes.stairs(shares, edges, label=text, color=color, linestyle=style, linewidth=1.5)
    axes.set_xlim(0, 1.05 * edges[-1])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("length in tokens")
    axes.set_ylabel("share of samples")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", frameon=False, fontsize="small")
    try:
        figure.savefig(path)
    except OSError as error:
        raise OutputError(f"Can't write {path}: {reason(error)}.") from error
