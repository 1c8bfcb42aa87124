"""A model's task scores beside those of its original, item by item."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qtool.evaluation.paired import Paired, verdict
from qtool.evaluation.scores import Score, TaskScores, compare_scores


@dataclass(frozen=True, slots=True)
class ModelTasks:
    """The scores of one model, and what it costs to keep."""

    name: str
    weight_bytes: int
    average_bits: float
    """Stored bits per weight of the quantized layers; 16 or 32 for an unquantized model."""
    tasks: tuple[TaskScores, ...]

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
    value: float
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
    """Return one row per score of the model, compared with the original's where there is one."""
    others = original.scores() if original is not None else {}
    rows = []
    for task in model.tasks:
        has_groups = any(score.group for score in task.scores)
        for score in task.scores:
            other = others.get((score.task, score.metric, score.filter))
            rows.append(_row(score, other, headline=score.group or not has_groups))
    return tuple(rows)


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
