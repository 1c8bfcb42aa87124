"""The picture of `qtool inspect --plot-search`: losses that a search measured, over its trials."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qtool.errors import CheckpointError
from qtool.report.lengths import new_axes, save_plot
from qtool.storage.jsonl import json_lines


@dataclass(frozen=True, slots=True)
class TrialLine:
    """A line of `search.jsonl` with a loss."""

    of: str
    """The linears, or the block, that was searched."""
    loss: float
    """In nats per token."""
    taken: bool


def read_trials(path: Path) -> tuple[TrialLine, ...]:
    """Return the trials of a `search.jsonl` whose loss was measured, in order.

    Raises:
        CheckpointError: there is no such file, or a line of it is none of a search.
        DataError: it can't be read.
    """
    if not path.exists():
        raise CheckpointError(
            f"No file {path}: nothing was searched. Give the recipe a section 'search'.", file=path
        )
    found = []
    for place, line in json_lines(path):
        try:
            what, loss, taken = str(line["of"]), line["loss"], bool(line["taken"])
        except (TypeError, KeyError):
            message = f"{place}: not a line of search.jsonl, with of, loss and taken."
            raise CheckpointError(message, file=path) from None
        if isinstance(loss, int | float):
            found.append(TrialLine(what, float(loss), taken))
    return tuple(found)


def draw_trials(path: Path, trials: Sequence[TrialLine]) -> None:
    """Write each loss over its number, with lines through what units began with and what was taken.

    The loss grows as more of the model is quantized. Raises as `new_axes` and `save_plot`.
    """
    axes = new_axes(path)
    first = [n for n, one in enumerate(trials) if n == 0 or trials[n - 1].of != one.of]
    taken = [n for n, one in enumerate(trials) if one.taken]
    everything = range(len(trials))
    axes.plot(everything, [one.loss for one in trials], ".", color="0.7", label="tried")
    for places, label, color in ((first, "as the recipe says", "black"), (taken, "taken", "C0")):
        axes.plot(places, [trials[n].loss for n in places], color=color, linewidth=1, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("losses measured")
    axes.set_ylabel("KL to the original, nats per token")
    save_plot(axes, path, legend="outside upper left")
