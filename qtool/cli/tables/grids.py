"""The table of `qtool grid`: a row per model and recipe."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qtool.cli import console
from qtool.wording import gigabytes

if TYPE_CHECKING:
    from qtool.pipeline import CellResult, GridResult, ScoreResult

_COLUMNS = ["model", "recipe", ">strict bits", ">on disk", ">KL", ">perplexity", "gates"]
_OF_SCORES = ["model", "recipe", "measured", "metric", ">value", ">standard error"]


def print_grid(done: "GridResult", out_dir: Path, json_file: Path | None) -> None:
    """Print one row per cell, and one per score, then what failed."""
    if console.write_json(asdict(done), json_file):
        if done.cells:
            console.print_table(str(out_dir), _COLUMNS, [_row(cell) for cell in done.cells])
        rows = [row for one in done.scores for row in _score_rows(one)]
        if rows:
            console.print_table(f"{out_dir}: scores", _OF_SCORES, rows)
        console.print_lines(done.failures())


def _score_rows(one: "ScoreResult") -> list[tuple[str, ...]]:
    begin = (one.model, one.recipe or "")
    figures = one.figures
    found = []
    if figures:
        found.append((*begin, one.measured, "perplexity", _number(figures["perplexity"]["value"])))
    kl = figures.get("closeness", {}).get("text", {}).get("kl_mean")
    if kl is not None:
        found.append((*begin, one.measured, "KL", _number(kl)))
    rows: list[tuple[str, ...]] = [(*row, "") for row in found]
    for score in one.scores:
        if score["headline"]:
            numbers = _number(score["value"]), _number(score["standard_error"])
            rows.append((*begin, score["task"], score["metric"], *numbers))
    return rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


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
