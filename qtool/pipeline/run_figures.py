"""The figures of a run, from what its steps have kept: what gates read, by dotted path."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from qtool.modeling.locate import Location
from qtool.pipeline.bench import BenchResult
from qtool.pipeline.evaluate import Comparison
from qtool.pipeline.kept_steps import StepResult
from qtool.pipeline.task_results import ModelTasks, TaskComparison
from qtool.recipe.gates import ON_CHATS, ON_TEXT

OF_AGREEMENT = {"kl_mean": "kl_divergence", "kl_p99": "kl_p99", "same_token": "top1_agreement"}
NOT_COMPARED = "The result wasn't compared with the original; the warning above says why."


def text_report(found: Comparison) -> dict[str, Any]:
    """Return what is kept of an evaluation on texts: as `qtool eval --json` has it, and more."""
    values = asdict(found)
    closeness = values["closeness"]
    return {
        "figures": values["figures"],
        "agreement": closeness["text"],
        "chats": closeness["chats"],
        "no_chats": closeness["no_chats"],
    }


def text_figures(kept: StepResult) -> dict[str, Any]:
    """Return perplexity, its ratio to the original's, and closeness."""
    measured = [one["perplexity"]["perplexity"] for one in kept["figures"]]
    figures: dict[str, Any] = {"perplexity": {"value": measured[-1]}}
    if len(measured) == 1:
        return figures
    original, value = measured
    known = original is not None and value is not None
    figures["ratios"] = {"perplexity": value / original if known else None}
    figures["perplexity"]["original"] = original
    figures["closeness"] = {
        ON_TEXT: _closeness(kept["agreement"], NOT_COMPARED),
        ON_CHATS: _closeness(kept["chats"], kept["no_chats"] or NOT_COMPARED),
    }
    return figures


def _closeness(agreement: StepResult | None, why_not: str) -> dict[str, Any]:
    if agreement is None:
        return {"why": why_not}
    return {name: agreement[key] for name, key in OF_AGREEMENT.items()}


def task_scores(found: TaskComparison) -> dict[str, Any]:
    """Return what is kept of tasks: a row per metric, what failed, and what each cost."""
    models = [one for one in (found.original, found.model) if one is not None]
    failures = [
        {"model": model.name, **asdict(failure)} for model in models for failure in model.failures
    ]
    asked = _asked(models)
    rows = [{**asdict(row), "asked": asked.get(row.task, row.task)} for row in found.rows]
    better = {key: score.higher_is_better for one in models for key, score in one.scores().items()}
    for row in rows:
        row["higher_is_better"] = better[row["task"], row["metric"], row["filter"]]
    return {"rows": rows, "failures": failures, "versions": dict(found.versions)}


def _asked(models: Sequence[ModelTasks]) -> dict[str, str]:
    """Return which requested task brought a score, by the task of the score."""
    return {
        score.task: task.name for model in models for task in model.tasks for score in task.scores
    }


def task_failures(kept: StepResult) -> tuple[str, ...]:
    """Return a sentence for each task that gave no scores."""
    return tuple(f"{one['task']} on {one['model']}: {one['message']}" for one in kept["failures"])


def score_figures(kept: StepResult) -> dict[str, Any]:
    """Return what each score lost, by requested task and metric."""
    found: dict[str, Any] = {}
    for failure in kept["failures"]:
        found[failure["task"]] = {"why": f"it failed on {failure['model']}: {failure['message']}"}
    for row in kept["rows"]:
        if not row["headline"] or row["value"] is None or row["original"] is None:
            continue
        parts = [row["asked"], row["task"], row["metric"], row["filter"]]
        words = [part for part in dict.fromkeys(parts) if part != "none"]
        gain = (row["value"] - row["original"]) * (1 if row["higher_is_better"] else -1)
        paired = row["paired"] or {}
        found[" ".join(words)] = {
            "loss": -gain,
            "value": row["value"],
            "original": row["original"],
            "p_value": paired.get("p_value"),
            "verdict": row["verdict"],
        }
    return {"scores": found}


def bench_report(found: BenchResult, result: Location, original: Location) -> dict[str, Any]:
    """Return what is kept of a bench, with what the kernels' end-to-end rows call the two."""
    if found.kernels is None:
        return {"figures": [asdict(one) for one in found.figures]}
    names = {"result": result, "original": original}
    called = {role: where.public_name or str(where.path) for role, where in names.items()}
    return {"kernels": asdict(found.kernels), **called}


def bench_figures(kept: StepResult) -> dict[str, Any]:
    """Return speeds over those of the original, and what the kernels reach of the card."""
    kernels = kept.get("kernels")
    if kernels is None:
        original, result = (one["speed"] for one in kept["figures"])
        return {"speed": _ratios(result, original)}
    models = {one["name"]: one for one in kernels["end_to_end"]}
    result, original = models.get(kept["result"]), models.get(kept["original"])
    names = ("end to end", kept["result"], kept["original"])
    not_run = {name: kernels["not_run"][name] for name in names if name in kernels["not_run"]}
    why = "; ".join(f"{name}: {reason}" for name, reason in not_run.items())
    ours = [(layer["count"], layer["rows"][0]) for layer in kernels["layers"]]
    seconds = sum(count * row["microseconds"] for count, row in ours) * 1e-6
    moved = sum(count * row["weight_bytes"] for count, row in ours)
    bandwidth = kernels["copy_gb_per_second"] * 1e9
    return {
        "speed": _ratios(result, original) if result and original else {"why": why},
        "kernels": {
            "copy_share": moved / seconds / bandwidth if seconds else None,
            "memory_bytes": result and result["peak_memory_bytes"],
            "why": why,
        },
    }


def _ratios(result: StepResult, original: StepResult) -> dict[str, Any]:
    names = {name: f"{name}_tokens_per_second" for name in ("prefill", "decode")}
    speeds: dict[str, Any] = {key: result[key] for key in names.values()}
    return speeds | {f"{name}_ratio": result[key] / original[key] for name, key in names.items()}
