"""The picture of `qtool inspect --plot`: what tuning gained, over its steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from qtool.errors import CheckpointError
from qtool.report.lengths import new_axes, save_plot
from qtool.storage.jsonl import json_lines

HeldOut = Sequence[tuple[int, float]]
"""Step and loss on held-out samples."""


def read_curves(path: Path) -> dict[str, HeldOut]:
    """Return the curves of a `tuning.jsonl`, by the name of the block or `model`.

    A loss that wasn't finite is left out.

    Raises:
        CheckpointError: there is no such file, or a line of it is none of a curve.
        DataError: it can't be read.
    """
    if not path.exists():
        raise CheckpointError(
            f"No file {path}: nothing was tuned. Quantize with --tune.", file=path
        )
    curves: dict[str, list[tuple[int, float]]] = {}
    for place, line in json_lines(path):
        try:
            what, step, loss = str(line["of"]), int(line["step"]), line["held_out"]
        except (TypeError, KeyError, ValueError):
            message = f"{place}: not a line of tuning.jsonl, with of, step and held_out."
            raise CheckpointError(message, file=path) from None
        if isinstance(loss, int | float):
            curves.setdefault(what, []).append((step, float(loss)))
    return {what: sorted(points) for what, points in curves.items()}


def draw_curves(path: Path, curves: Mapping[str, HeldOut]) -> None:
    """Write each loss over its steps, as a share of what it was: blocks and model have other units.

    Raises as `new_axes` and `save_plot`.
    """
    axes = new_axes(path)
    blocks = [what for what in curves if what != "model"]
    for index, what in enumerate(blocks):
        label = what if index in (0, len(blocks) - 1) else None
        shade = 0.3 + 0.7 * (index + 1) / len(blocks)  # the first is pale
        steps, shares = _shares(curves[what])
        axes.plot(steps, shares, color=(0.0, 0.45, 0.7, shade), linewidth=1, label=label)
    if "model" in curves:
        axes.plot(*_shares(curves["model"]), color="black", linewidth=2, label="model")
    axes.axhline(1, color="black", linestyle=":", linewidth=0.5)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("steps")
    axes.set_ylabel("held-out loss, of the first")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    save_plot(axes, path, legend="outside upper left")


def _shares(points: HeldOut) -> tuple[list[int], list[float]]:
    begin = points[0][1] or 1.0
    return [step for step, _ in points], [loss / begin for _, loss in points]
