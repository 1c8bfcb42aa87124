"""What models have written after prompts, one row per model."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qtool.cli import console

if TYPE_CHECKING:
    from qtool.pipeline import ModelWritten

WRITTEN_COLUMNS = ("model", ">BLEU", ">NIST", ">ROUGE-1", ">ROUGE-2", ">ROUGE-L", ">tokens")


def show_written(models: "Sequence[ModelWritten]", json_file: Path | None) -> None:
    """Write the scores and answers as JSON, and print the scores."""
    report = {
        "models": [
            {"name": one.name, "scores": asdict(one.scores), "answers": one.answers}
            for one in models
        ]
    }
    if not console.write_json(report, json_file):
        return
    rows = []
    for one in models:
        scores = one.scores
        values = (scores.bleu, scores.nist, scores.rouge1, scores.rouge2, scores.rouge_l)
        shown = ("-" if value is None else f"{value:.2f}" for value in values)
        rows.append((one.name, *shown, str(scores.written_tokens)))
    console.print_table("", WRITTEN_COLUMNS, rows)
    last = models[-1].scores
    console.print_lines([f"{last.prompts} prompts, {last.references} references, greedy search."])
