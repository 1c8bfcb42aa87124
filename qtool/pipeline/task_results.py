"""A model's task scores beside those of its original, item by item."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from qtool.core.paired import Paired, verdict
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


OF_A_SCORE = ("task", "metric", "filter", "shots", "num_items", "value", "standard_error", "group")


def score_rows(model: ModelTasks, original: ModelTasks | None) -> tuple[ScoreRow, ...]:
    """Return one row per score of either model, compared where both have it."""
    others = original.scores() if original is not None else {}
    rows = [
        _row(score, task, others.get((score.task, score.metric, score.filter)))
        for task in model.tasks
        for score in task.scores
    ]
    done = {task.name for task in model.tasks}
    for task in original.tasks if original is not None else ():
        for score in task.scores if task.name not in done else ():
            row = _row(score, task, None)
            rows.append(replace(row, value=None, standard_error=None, original=score.value))
    return tuple(rows)


def _row(score: Score, task: TaskScores, original: Score | None) -> ScoreRow:
    values = {name: getattr(score, name) for name in OF_A_SCORE}
    headline = score.group or not any(one.group for one in task.scores)
    row = ScoreRow(**values, headline=headline)
    if original is None:
        return row
    paired = compare_scores(original, score)
    better = score.higher_is_better
    shown = verdict(paired, higher_is_better=better) if paired is not None else ""
    return replace(row, original=original.value, paired=paired, verdict=shown)
