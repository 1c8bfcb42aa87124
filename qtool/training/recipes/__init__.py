"""Training recipes: how a whole model learns to be few bits, from data, once it is quantized.

One file per recipe, constant TRAINING; the command line calls it by the file's name, with `-` for
`_`. A recipe makes a student of what it is given (`Trainee`), says in which stages, by which losses
and rates it learns (`TrainingStage`), and what a checkpoint stores of it (`PreparedTraining`). The
loop, its memory of a run that was stopped, and the writing are the same for all:
`steps.train_model`, `training.descent`.

What a recipe has at hand:

- `training.student.make_student` puts layers that learn, over `Codec.trainable`, in the place of
  linears; a recipe may put modules of its own there (`Learning.parameters`);
- `Learning.feed(step)` is called before each step, `Learning.after(step)` after each: schedules of
  anything live there. Both must depend on the step alone, so that a run that was stopped goes on to
  the same result;
- `training.following` has the losses that follow the original: predictions, hidden states,
  attention; any other term is `Following.extra`;
- several stages begin Adam anew; each ends with what was best on the held-out lessons, or with
  what came last (`Schedule.keeps`);
- `PreparedTraining.results` names what is stored: `QuantizedTensor`s of any format by layer, other
  tensors by full name. What it doesn't name stays as it was.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qtool import plugins
from qtool.base import CausalModel, ModelAdapter, QuantizedTensor
from qtool.core.parts import Parts
from qtool.training.descent import Learning
from qtool.training.lessons import Lessons
from qtool.training.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainee:
    """What a recipe is given."""

    original: CausalModel
    """Dense, on the device, in evaluation mode; nothing in it learns: the teacher."""
    layers: Mapping[str, QuantizedTensor] = field(default_factory=dict)
    """Where the linears of the blocks begin, by module name; empty where nothing is quantized."""
    tables: Mapping[str, QuantizedTensor] = field(default_factory=dict)
    """Embedding and head, if they are quantized; they stay."""
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    """All else that the checkpoint has, by full name: norms and biases, which may learn."""
    lessons: Lessons
    places: ModelAdapter
    """What the parts of the model are called."""
    steps: int
    """How many are taken in all."""
    learning_rate: float
    """At its highest: the user's, or the recipe's `learning_rate`."""
    warmup: int
    """Steps until then."""
    checks: int = 20
    """So often the held-out lessons are looked at."""
    autocast: torch.dtype | None = None
    """In which the student runs; None: as it is."""
    recompute: bool = False
    """Run each block once more on the way back, in place of keeping what it computed."""
    parts: Parts | None = None
    """That batches are learned from in where memory is full, or where a step is accumulated."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStage:
    """One descent; Adam begins anew in each."""

    name: str
    """Tells it from the others; a word or two."""
    learning: Learning
    schedule: Schedule
    begin: Callable[[], None] = lambda: None
    """Called before it, also by a run that goes on after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedTraining:
    """A student, ready to learn."""

    student: CausalModel
    """What is scored at the end."""
    stages: Sequence[TrainingStage]
    results: Callable[[], Mapping[str, QuantizedTensor | Tensor]]
    """What is stored of it now: weights by layer, other tensors by full name."""
    notes: Callable[[], Mapping[str, Any]] = dict
    """What was decided, such as ranks: goes into the manifest and the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The extension point: one file in `qtool/training/recipes` with the constant TRAINING."""

    summary: str
    """One sentence for `qtool train --help`."""
    options: type
    """Frozen dataclass of what can be set."""
    prepare: Callable[[Trainee, Any], PreparedTraining]
    learning_rate: float
    """If nobody says another."""
    is_dense: bool = False
    """It begins at a dense model, and writes one; else at a checkpoint, and writes that."""


def load_training(name: str) -> Training:
    """Return a recipe by name.

    Raises:
        UnknownNameError: there is none of that name.
    """
    return plugins.load_named(sys.modules[__name__], name, "TRAINING", Training, "training recipes")
