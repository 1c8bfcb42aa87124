"""The table of `qtool grid`: a row per model and recipe."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qtool.cli import console
from qtool.wording import gigabytes

if TYPE_CHECKING:
    from qtool.pipeline import CellResult

_COLUMNS = ["model", "recipe", ">strict bits", ">on disk", ">KL", ">perplexity", "gates"]


def print_grid(cells: Sequence["CellResult"], out_dir: Path, json_file: Path | None) -> None:
    """Print one row per cell, then what failed."""
    if console.write_json({"cells": [asdict(cell) for cell in cells]}, json_file):
        console.print_table(str(out_dir), _COLUMNS, [_row(cell) for cell in cells])
        failed = [cell for cell in cells if cell.failure is not None]
        console.print_lines([f"{each.model}, {each.recipe}: {each.failure}" for each in failed])


def _row(cell: "CellResult") -> tuple[str, ...]:
    size, text = cell.figures.get("size", {}), cell.figures.get("text", {})
    kl, perplexity = text.get("kl_mean"), text.get("perplexity")
    return (
        cell.model,
        cell.recipe,
        f"{size['strict_bits']:.3f}" if size else "",
        gigabytes(size["bytes"]) if size else "",
        "" if kl is None else f"{kl:.4f}",
        "" if perplexity is None else f"{perplexity:.3f}",
        "passed" if cell.passed else "failed",
    )
