"""Models beside the first of them: as tables, as Markdown and for machines."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.cli import console
from qtool.cli.tables.divergences import BlockAndChange, block_rows, estimate_text
from qtool.wording import gigabytes, with_error

if TYPE_CHECKING:
    from qtool.evaluation.scores import TaskFailure
    from qtool.pipeline.compare import ComparedModel, ModelsCompared
    from qtool.pipeline.model_texts import TextFigures
    from qtool.pipeline.task_results import ScoreRow

OVERVIEW = ["model", ">bits", ">strict bits", ">size", ">perplexity", ">ratio"]
OVERVIEW += [">KL", ">KL 99 %", ">same token", ">KL, chats"]
SCORE_COLUMNS = [
    "task",
    "metric",
    ">shots",
    ">items",
    "model",
    ">score",
    ">difference",
    ">p",
    "verdict",
]


@dataclass(frozen=True, slots=True)
class Table:
    """A table as text; a column written as `>name` is at the right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def compared_report(result: "ModelsCompared") -> dict[str, Any]:
    """Return the result for machines; values of single items stay in the cache."""
    report = asdict(result)
    for model in report["models"]:
        for task in (model["tasks"] or {}).get("tasks", ()):
            for score in task["scores"]:
                del score["items"]
        model["failures"] = (model["tasks"] or {}).pop("failures", ())
    return report


def print_compared(result: "ModelsCompared") -> None:
    """Print all tables, and what they hold for."""
    for table in compared_tables(result, all_rows=False):
        console.print_table(table.title, table.columns, table.rows)
    console.print_lines(_conditions(result))


def write_compared(result: "ModelsCompared", target: Path | None) -> bool:
    """Write all tables as Markdown, as `console.write_json` does JSON."""
    if target is None:
        return True
    lines: list[str] = []
    for table in compared_tables(result, all_rows=True):
        lines += [f"**{table.title}**", ""] if lines else []
        names = [name.removeprefix(">") for name in table.columns]
        sides = ["---:" if name.startswith(">") else ":---" for name in table.columns]
        lines += [_line(names), _line(sides), *map(_line, table.rows), ""]
    lines += [f"- {line}" for line in _conditions(result)]
    console.write_text("\n".join(lines), target)
    return str(target) != "-"


def compared_tables(result: "ModelsCompared", *, all_rows: bool) -> Iterator[Table]:
    """Yield one row per model; for each text what llama-perplexity prints; the scores.

    `all_rows`: of a group of tasks the members too.
    """
    rows = [_overview(one) for one in result.models]
    first = result.models[0]
    if result.noise is not None:
        rows.insert(1, _noise_row(first, result.noise))
    filled = [any(row[place] for row in rows) for place in range(len(OVERVIEW))]
    kept = [place for place, is_filled in enumerate(filled) if is_filled]
    yield Table("", *_columns(OVERVIEW, rows, kept))
    against = [(one.label, one.texts) for one in result.models[1:]]
    against.append((f"{first.label} (noise)", result.noise))
    for name in ("text", "chats"):
        blocks: dict[str, BlockAndChange] = {}
        for label, texts in against:
            if texts is not None and (block := getattr(texts, name)) is not None:
                blocks[label] = (block, texts.change if name == "text" else None)
        if blocks:
            yield Table(_block_title(first.label, blocks), *block_rows(blocks))
    scores = [_score_cells(one, row) for row, one in _by_score(result) if all_rows or row.headline]
    if scores:
        yield Table("Tasks", SCORE_COLUMNS, scores)


def _columns(
    names: Sequence[str], rows: Sequence[Sequence[str]], kept: Sequence[int]
) -> tuple[list[str], list[list[str]]]:
    return [names[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _overview(one: "ComparedModel") -> tuple[str, ...]:
    figures, texts = one.figures, one.texts
    change = texts.change if texts is not None else None
    return (
        one.label,
        "" if one.foreign is not None else f"{figures.average_bits:.2f}",
        f"{one.strict_bits:.2f}",
        gigabytes(figures.weight_bytes),
        f"{texts.perplexity.perplexity:.3f}" if texts is not None else "",
        estimate_text(change.ratio) if change is not None else "",
        *_closeness_cells(texts),
    )


def _noise_row(first: "ComparedModel", noise: "TextFigures") -> tuple[str, ...]:
    return (f"{first.label} (noise)", "", "", "", "", "", *_closeness_cells(noise))


def _closeness_cells(texts: "TextFigures | None") -> tuple[str, ...]:
    text, chats = (texts.text, texts.chats) if texts is not None else (None, None)
    return (
        estimate_text(text.divergence.mean) if text is not None else "",
        with_error(text.divergence.percentiles["99"].value) if text is not None else "",
        with_error(text.same.value, percent=True) if text is not None else "",
        estimate_text(chats.divergence.mean) if chats is not None else "",
    )


def _block_title(first: str, blocks: "Mapping[str, BlockAndChange]") -> str:
    block, _ = next(iter(blocks.values()))
    return (
        f"Against {first} on {block.dataset}, {block.positions} predictions in windows of "
        f"{block.context_length} tokens"
    )


def _by_score(result: "ModelsCompared") -> "Iterator[tuple[ScoreRow, ComparedModel]]":
    """Yield (score, model) in the order of the first model's scores, the models below each."""
    order = {key: None for one in result.models for row in one.rows for key in [_key(row)]}
    for key in order:
        for one in result.models:
            yield from ((row, one) for row in one.rows if _key(row) == key)


def _key(row: "ScoreRow") -> tuple[str, str, str]:
    return row.task, row.metric, row.filter


def _score_cells(one: "ComparedModel", row: "ScoreRow") -> tuple[str, ...]:
    metric = row.metric if row.filter == "none" else f"{row.metric}, {row.filter}"
    shots = "" if row.shots is None else str(row.shots)
    value = "" if row.value is None else with_error(row.value, row.standard_error)
    paired, p_value, difference = row.paired, "", ""
    if paired is not None:
        difference = with_error(paired.difference, paired.standard_error)
        p_value = "" if paired.p_value is None else f"{paired.p_value:.2g}"
    elif row.original is not None and row.value is not None:
        difference = with_error(row.value - row.original)
    cells = (row.task, metric, shots, str(row.num_items), one.label, value)
    return (*cells, difference, p_value, row.verdict)


def _conditions(result: "ModelsCompared") -> list[str]:
    """Return what the numbers hold for, and what there is none of."""
    first, lines = result.models[0], []
    measured = next((one.texts.perplexity for one in result.models if one.texts), None)
    if measured is not None:
        lines.append(
            f"Perplexity: {measured.conditions}; its errors take windows as independent, "
            "those of KL and Δp predictions."
        )
        lines.append(
            "KL in nats per token. Δp: probability of the token that follows, less that of "
            f"{first.label}."
        )
        lines += _noise_lines(first, result.noise)
    lines.append("Bits: of quantized weights, with scales; strict: of all on disk, per weight.")
    if any(one.rows for one in result.models):
        lines.append(
            f"Differences are to {first.label}, paired item by item; ± is one standard error. A "
            "verdict needs p < 0.05 and says nothing of rows beside it."
        )
    if result.protections:
        lines.append(f"Programs ran with: {', '.join(result.protections)}.")
    for one in result.models:
        if one.foreign is not None:
            lines.append(f"{one.label} was quantized by another tool, as {one.foreign}.")
        why = one.texts.why_not if one.texts is not None else ()
        lines += [f"{one.label}: {each}" for each in why]
        if one.failure is not None:
            lines.append(f"FAILED: the texts of {one.label}: {one.failure}")
        failed: Iterable[TaskFailure] = one.tasks.failures if one.tasks is not None else ()
        lines += [f"FAILED: {each.task} on {one.label}: {each.message}" for each in failed]
    return lines


def _noise_lines(first: "ComparedModel", noise: "TextFigures | None") -> list[str]:
    block = noise.text or noise.chats if noise is not None else None
    if block is None:
        return []
    return [
        f"Noise: {first.label} against itself, {block.batch} windows at a time in place of one. "
        "What isn't larger says nothing."
    ]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
