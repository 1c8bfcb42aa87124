"""Task scores as a table, as Markdown and for machines."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.cli import console
from qtool.errors import QtoolError
from qtool.wording import gigabytes

if TYPE_CHECKING:
    from qtool.evaluation.scores import TaskFailure, TaskScores
    from qtool.pipeline.task_results import ModelTasks, ScoreRow, TaskComparison

LEFT = ("task", "metric", "verdict")


def print_tasks(result: "TaskComparison") -> None:
    """Print one row per metric; of a group of tasks, only the group."""
    rows = [row for row in result.rows if row.headline]
    columns = [name if name in LEFT else f">{name}" for name in _columns(result)]
    if rows:
        console.print_table("", columns, [_cells(result, row) for row in rows])
    console.print_lines(_conditions(result))


def write_markdown(result: "TaskComparison", target: Path | None) -> bool:
    """Write all rows and their conditions as Markdown, as `console.write_json` does JSON."""
    if target is None:
        return True
    names = _columns(result)
    lines = [_line(names), _line([":---" if name in LEFT else "---:" for name in names])]
    lines += [_line(_cells(result, row)) for row in result.rows]
    lines = [*lines, ""] if result.rows else []
    lines += [f"- {line}" for line in _conditions(result)]
    console.write_text("\n".join(lines), target)
    return str(target) != "-"


def task_report(result: "TaskComparison") -> dict[str, Any]:
    """Return the result for machines; values of single items stay in the cache."""
    report = asdict(result)
    for model in (report["model"], report["original"]):
        for task in (model or {}).get("tasks", ()):
            for score in task["scores"]:
                del score["items"]
        if model is not None:
            del model["failures"]
    failures = [{"model": model, **asdict(failure)} for model, failure in _failures(result)]
    return {**report, "failures": failures}


def raise_failures(result: "TaskComparison") -> None:
    """Raise, once results are written, if there are some that are missing.

    Raises:
        QtoolError: tasks failed.
    """
    failures = [f"{failure.task} on {model}" for model, failure in _failures(result)]
    if failures:
        raise QtoolError(
            f"Failed: {', '.join(failures)}. Why is said with the scores (in JSON: `failures`). "
            "The same command again runs only what isn't kept."
        )


def _columns(result: "TaskComparison") -> list[str]:
    names = ["task", "metric", "shots", "items", *_labels(result)]
    return names if result.original is None else [*names, "difference", "p", "verdict"]


def _labels(result: "TaskComparison") -> list[str]:
    """Return the names of the original, if it ran, and of the model; never the same twice."""
    if result.original is None:
        return [result.model.name]
    name, other = result.model.name, result.original.name
    return [other if other != name else f"{other} (baseline)", name]


def _models(result: "TaskComparison") -> list[tuple[str, "ModelTasks"]]:
    """Return (label, model) in the order of the columns."""
    models = [model for model in (result.original, result.model) if model is not None]
    return list(zip(_labels(result), models, strict=True))


def _failures(result: "TaskComparison") -> list[tuple[str, "TaskFailure"]]:
    """Return (label of the model, failure)."""
    return [(label, one) for label, model in _models(result) for one in model.failures]


def _cells(result: "TaskComparison", row: "ScoreRow") -> tuple[str, ...]:
    metric = row.metric if row.filter == "none" else f"{row.metric}, {row.filter}"
    shots = "" if row.shots is None else str(row.shots)
    cells = (row.task, metric, shots, str(row.num_items))
    if result.original is None:
        return (*cells, _number(row.value, row.standard_error))
    # of two models only the error of the difference says something
    paired, p_value, difference = row.paired, "", ""
    if paired is not None:
        difference = _number(paired.difference, paired.standard_error, "+")
        p_value = "" if paired.p_value is None else f"{paired.p_value:.2g}"
    elif row.original is not None and row.value is not None:
        difference = _number(row.value - row.original, sign="+")
    return (*cells, _number(row.original), _number(row.value), difference, p_value, row.verdict)


def _number(value: float | None, error: float | None = None, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _conditions(result: "TaskComparison") -> list[str]:
    """Return what the scores hold for, and what gave none."""
    lines = [
        f"{label}: {model.average_bits:.2f} bits per weight, "
        f"{gigabytes(model.weight_bytes)}{_time(model)}."
        for label, model in _models(result)
    ]
    tasks = [task for _, model in reversed(_models(result)) for task in model.tasks]
    if tasks:
        lines += _settings(tasks, result.versions["lm-eval"])
    for label, model in _models(result):
        truncated = sum(task.truncated for task in model.tasks)
        if truncated:
            longest = model.tasks[0].settings["longest"]
            lines.append(
                f"{label}: {truncated} requests didn't fit into {longest} tokens, and were cut "
                "from the left."
            )
    if result.protections:
        lines.append(f"Programs ran with: {', '.join(result.protections)}.")
    if result.original is not None:
        lines.append(
            "Differences are paired, item by item; ± is one standard error. A verdict needs "
            "p < 0.05 and says nothing of rows beside it."
        )
    lines += [f"FAILED: {one.task} on {label}: {one.message}" for label, one in _failures(result)]
    return lines


def _settings(tasks: Sequence["TaskScores"], version: str) -> list[str]:
    settings = tasks[0].settings
    limit, seed, subject = settings["limit"], settings["seed"], settings["model"]
    lines = [
        f"{subject['dtype']} on {subject['device']}, batch size "
        f"{settings['batch size']}, at most {settings['longest']} tokens, "
        + ("all items" if limit is None else f"first {limit} items of each task")
        + (", chat template" if settings["chat template"] else "")
        + ("" if seed is None else f", seed {seed}")
        + f"; lm-eval {version}."
    ]
    generation = [t.settings["generation"] for t in tasks if "generation" in t.settings]
    if generation:  # the same in all
        given = ", ".join(f"{key}={value!r}" for key, value in generation[0].items())
        lines.append(f"Answers were written with {given}.")
    return lines


def _time(model: "ModelTasks") -> str:
    run = [task.seconds for task in model.tasks if not task.cached]
    kept = [task.name for task in model.tasks if task.cached]
    parts = [f"{sum(run):.0f} s"] if run else []
    parts += [f"kept from an earlier run: {', '.join(kept)}"] if kept else []
    return f", {'; '.join(parts)}" if parts else ""
