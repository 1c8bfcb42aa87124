"""What was measured of a checkpoint, as it is kept beside it for the model card."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qtool.evaluation.scores import Score


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseRecord:
    """How closely a checkpoint follows its original on one text."""

    dataset: str
    positions: int
    context_length: int
    kl: float | None
    """Mean KL(original || checkpoint), nats per token; None: infinite."""
    kl_error: float | None
    kl_p99: float | None
    same_token: float
    same_token_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecord:
    """A measurement on texts."""

    conditions: str
    """Of the perplexity; empty: there is none."""
    perplexity: float | None = None
    original: float | None = None
    """Perplexity of the original in the same run."""
    closeness: tuple[CloseRecord, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedRecord:
    """A score beside that of the original, on the same items."""

    task: str
    metric: str
    original: float
    value: float
    difference: float
    error: float | None
    p_value: float | None
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRecord:
    """One requested task."""

    conditions: str
    scores: tuple[Score, ...]
    """Without their items; those that are finite."""
    paired: tuple[PairedRecord, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All that is kept; a newer measurement takes the place of an older one of the same kind."""

    texts: TextRecord | None = None
    tasks: Mapping[str, TaskRecord] = field(default_factory=dict)
    table: str = ""
    """The scores of all tasks, as lm-eval prints them."""
