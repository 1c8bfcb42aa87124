"""What `train` is asked for, and what it returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtool.modeling.locate import Location
from qtool.steps.train_model import TrainOptions


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What `train` has made."""

    out_dir: Path
    recipe: str
    first_loss: float
    """On the held-out texts, before anything is learned."""
    best_loss: float
    steps: int
    """Of all stages."""
    seconds: float
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Of classifiers, on the held-out texts: of the `original`, `before`, and `after`."""
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """What is trained on what, and where it goes."""

    model: Location
    data: Path
    out_dir: Path
    recipe: str
    validation: Path | None = None
    """Texts to look at; None: some of `data` are held out."""
    original: Location | None = None
    """What was quantized, and is followed; None: what the checkpoint names as its source."""
    options: TrainOptions = field(default_factory=TrainOptions)
    overwrite: bool = False
    resume: bool = False
