"""Scores of one model on one task: what lm-eval computed, and the value of every item."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, fsum, isclose, isfinite, log, nan
from numbers import Real
from typing import Any, Literal

import numpy as np

from qtool.core.paired import (
    Paired,
    Weighted,
    error_of_sum,
    paired_means,
    paired_ratios,
)
from qtool.storage.plain_json import JsonValue

Item = float | Weighted
Kind = Literal["mean", "perplexity", "bits", "other"]
"""How a score comes from its items: their mean; exp(-sum of log-likelihoods / sum of weights); that
in bits; or in a way that has no paired test here."""

RATIOS: Mapping[str, Kind] = {
    "word_perplexity": "perplexity",
    "byte_perplexity": "perplexity",
    "perplexity": "perplexity",
    "bits_per_byte": "bits",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One metric of one task or group."""

    task: str
    metric: str
    filter: str
    """Of lm-eval, how an answer is taken from a text; "none" for most tasks."""
    value: float
    standard_error: float | None
    higher_is_better: bool
    num_items: int
    shots: int | None
    """Examples in the prompt; None: a group whose tasks differ."""
    version: str
    """Of lm-eval's task."""
    kind: Kind
    group: bool = False
    """The score of several tasks together."""
    items: tuple[Item, ...] = ()
    """One value per item, in the order of the data; (log-likelihood, weight) for perplexities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScores:
    """All scores of one requested task, and what they hold for."""

    name: str
    scores: tuple[Score, ...]
    seconds: float
    truncated: int
    """Requests that were cut because they were longer than the model's context."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    cached: bool = False
    """Nothing was run: an earlier run left these scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFailure:
    """A requested task that gave no scores."""

    task: str
    error: str
    """The kind of error, by its name."""
    message: str
    """What is wrong, where, and what to do next."""


def collect_scores(results: Mapping[str, Any]) -> tuple[Score, ...]:
    """Return the scores in what lm-eval's `evaluate` returns with samples, groups first."""
    items = _items(results["samples"])
    groups = results.get("groups") or {}
    subtasks = results.get("group_subtasks") or {}
    scores = []
    for task, metrics in results["results"].items():
        leaves = _leaves(task, subtasks) if task in groups else [task]
        for metric, name, value in _metrics(metrics):
            found = [items.get((leaf, metric, name)) for leaf in leaves]
            values = [value for part in found for value in part or ()]
            scores.append(_score(results, (task, metric, name), value, values))
    return tuple(scores)


def _metrics(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yield (metric, filter, value) of one task."""
    for key, value in metrics.items():
        metric, comma, name = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, Real):
            yield metric, name, float(value)


def _items(
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[tuple[str, str, str], list[Item]]:
    """Return the values of items by (task, metric, filter), in the order of the data."""
    values: dict[tuple[str, str, str], list[Item]] = {}
    for task, rows in samples.items():
        for row in sorted(rows, key=lambda row: row["doc_id"]):
            for metric in row["metrics"]:
                values.setdefault((task, metric, row["filter"]), []).append(_item(row[metric]))
    return values


def _item(value: JsonValue) -> JsonValue:
    """Return a value of an item as plain numbers; what isn't one stays, and has no test here."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_item, value))
    return float(value) if isinstance(value, (Real, np.bool_)) else value


def _leaves(name: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    members = subtasks.get(name)
    return [leaf for m in members for leaf in _leaves(m, subtasks)] if members else [name]


def _score(
    results: Mapping[str, Any], of: tuple[str, str, str], value: float, items: list[Any]
) -> Score:
    task, metric, name = of
    kind = _kind(metric, value, items)
    better = (results.get("higher_is_better") or {}).get(task) or {}
    shots = (results.get("n-shot") or {}).get(task)
    return Score(
        task=task,
        metric=metric,
        filter=name,
        value=value,
        standard_error=standard_error(kind, items),
        higher_is_better=bool(better.get(metric, metric not in RATIOS)),
        num_items=len(items),
        shots=shots if isinstance(shots, int) else None,
        version=str((results.get("versions") or {}).get(task, "")),
        kind=kind,
        group=task in (results.get("groups") or {}),
        items=tuple(items) if kind != "other" else (),
    )


def _kind(metric: str, value: float, items: list[Any]) -> Kind:
    """Return how the score comes from its items: "other" if it isn't what they give.

    That is so for groups that average their tasks, and for what isn't finite.
    """
    kind = RATIOS.get(metric, "mean")
    usable = (isinstance(i, float) or (kind != "mean" and _is_pair(i)) for i in items)
    if not items or not all(usable):
        return "other"
    mean = _ratio(_pairs(items))
    if kind == "perplexity":
        mean, value = -mean, log(value) if value > 0 else nan
    elif kind == "bits":
        mean = -mean / log(2)
    same = isfinite(mean) and isclose(mean, value, rel_tol=1e-9, abs_tol=1e-12)
    return kind if same else "other"


def _is_pair(item: JsonValue) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and all(isinstance(i, float) for i in item)  # noqa: PLR2004


def _ratio(pairs: Sequence[Weighted]) -> float:
    weight = fsum(weight for _, weight in pairs)
    return fsum(value for value, _ in pairs) / weight if weight > 0 else nan


def standard_error(kind: Kind, items: Sequence[Any]) -> float | None:
    """Return the standard error of a score over its items; None if it has none here.

    Of a perplexity to first order: its logarithm is a ratio of two sums over items.
    """
    if kind == "other" or len(items) < 2:  # noqa: PLR2004
        return None
    pairs = _pairs(items)
    ratio, (values, weights) = _ratio(pairs), np.array(pairs).T
    error = error_of_sum(values - ratio * weights) / fsum(weights)
    if kind == "mean":
        return error
    return error / log(2) if kind == "bits" else exp(-ratio) * error


def compare_scores(original: Score, quantized: Score) -> Paired | None:
    """Return the paired comparison of two models on the same items; None if there is none."""
    if quantized.kind == "other" or len(original.items) != len(quantized.items):
        return None
    pairs = _pairs(original.items), _pairs(quantized.items)
    if quantized.kind == "mean":
        values = ([value for value, _ in one] for one in pairs)
        return paired_means(*values, higher_is_better=quantized.higher_is_better)
    return paired_ratios(*pairs, unit=quantized.kind)


def _pairs(items: Sequence[Any]) -> list[Weighted]:
    """Return (log-likelihood, weight); an item that is a number alone weighs 1."""
    return [item if isinstance(item, tuple) else (item, 1.0) for item in items]
