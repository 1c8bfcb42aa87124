"""A model's task scores beside those of its original, item by item."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from qtool.evaluation.paired import Paired, verdict
from qtool.evaluation.scores import Score, TaskFailure, TaskScores, compare_scores


@dataclass(frozen=True, slots=True)
class ModelTasks:
    """The scores of one model, and what it costs to keep."""

    name: str
    weight_bytes: int
    average_bits: float
    """Stored bits per weight of the quantized layers; 16 or 32 for an unquantized model."""
    tasks: tuple[TaskScores, ...]
    failures: tuple[TaskFailure, ...] = ()
    """Requested tasks that gave no scores."""

    def scores(self) -> dict[tuple[str, str, str], Score]:
        """Return all scores by (task, metric, filter)."""
        return {(s.task, s.metric, s.filter): s for task in self.tasks for s in task.scores}


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One metric of one task: of the model, and of its original if that ran too."""

    task: str
    metric: str
    filter: str
    shots: int | None
    num_items: int
    value: float | None
    """None: the task failed on the model, and not on its original."""
    standard_error: float | None
    group: bool
    headline: bool
    """Belongs in a short table: a requested task, or a group of tasks rather than its members."""
    original: float | None = None
    paired: Paired | None = None
    verdict: str = ""
    """Of the paired test; empty without an original, or for metrics that have no test here."""


@dataclass(frozen=True, slots=True)
class TaskComparison:
    """Scores of a model and of its original on the same items."""

    model: ModelTasks
    original: ModelTasks | None
    rows: tuple[ScoreRow, ...]
    protections: tuple[str, ...] = ()
    """What kept programs that a model wrote from doing harm, if any ran."""
    versions: Mapping[str, str] = field(default_factory=dict)


def score_rows(model: ModelTasks, original: ModelTasks | None) -> tuple[ScoreRow, ...]:
    """Return one row per score of either model, compared where both have it."""
    done = {task.name for task in model.tasks}
    others = original.scores() if original is not None else {}
    rows = []
    for task in model.tasks:
        for score in task.scores:
            other = others.get((score.task, score.metric, score.filter))
            rows.append(_row(score, other, headline=_is_headline(score, task)))
    for task in original.tasks if original is not None else ():
        if task.name not in done:
            rows += [_row_of_original(s, headline=_is_headline(s, task)) for s in task.scores]
    return tuple(rows)


def _is_headline(score: Score, task: TaskScores) -> bool:
    return score.group or not any(one.group for one in task.scores)


def _row(score: Score, original: Score | None, *, headline: bool) -> ScoreRow:
    paired = compare_scores(original, score) if original is not None else None
    better = score.higher_is_better
    return ScoreRow(
        task=score.task,
        metric=score.metric,
        filter=score.filter,
        shots=score.shots,
        num_items=score.num_items,
        value=score.value,
        standard_error=score.standard_error,
        group=score.group,
        headline=headline,
        original=original.value if original is not None else None,
        paired=paired,
        verdict=verdict(paired, higher_is_better=better) if paired is not None else "",
    )


def _row_of_original(score: Score, *, headline: bool) -> ScoreRow:
    row = _row(score, None, headline=headline)
    return replace(row, value=None, standard_error=None, original=score.value)
