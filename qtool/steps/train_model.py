"""Train a student through the stages of a recipe, and go on where that was stopped."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from qtool.base import CausalModel, Emit, Fallback, ModelAdapter, Notice, Progress
from qtool.core.parts import Parts
from qtool.errors import ModelError
from qtool.plugins import PluginOptions
from qtool.steps.options import read_options
from qtool.training.descent import STEPS, Memory, descend
from qtool.training.lessons import Lessons
from qtool.training.recipes import PreparedTraining, Trainee, Training, TrainingStage
from qtool.training.schedule import Point
from qtool.training.together import SharedMemory, fellows


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """How a model is trained."""

    steps: int | None = None
    """None: as many as `epochs` take."""
    epochs: float = 3.0
    batch_size: int = 16
    accumulate: int = 1
    """In so many parts a batch is learned from, whose gradients are summed: the same result in
    less memory."""
    learning_rate: float | None = None
    """None: as the recipe has it."""
    warmup_share: float = 0.1
    """Of the steps."""
    max_length: int = 512
    """Tokens of a text; longer ones are cut."""
    packing: bool = False
    """Never: lessons are whole rows."""
    recompute: bool = False
    """Run each block once more on the way back in place of keeping what it computed."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """In which the student multiplies; auto: bfloat16 on a card."""
    checks: int = 20
    """So often the held-out texts are looked at."""
    seed: int = 0
    kind_options: Mapping[str, Any] = field(default_factory=dict)

    def checked(self, kind: Training) -> PluginOptions:
        """Return the options of the recipe itself.

        Raises:
            RecipeError: unknown key, wrong type or impossible value.
        """
        return read_options("train", kind.options, self.kind_options, "--set")

    def autocast(self, device: torch.device) -> torch.dtype | None:
        """Return in which dtype the student multiplies; None: as it is."""
        mixed = self.precision == "bfloat16" or (self.precision == "auto" and device.type == "cuda")
        return torch.bfloat16 if mixed else None

    def num_steps(self, steps_per_epoch: int) -> int:
        """Return how many steps are taken."""
        return self.steps or max(1, math.ceil(self.epochs * steps_per_epoch))

    def trainee(
        self,
        kind: Training,
        original: CausalModel,
        lessons: Lessons,
        places: ModelAdapter,
        emit: Emit,
    ) -> Trainee:
        """Return what a recipe is given to begin with, of a model of which nothing is quantized."""
        steps = self.num_steps(lessons.steps_per_epoch)
        parts = Parts(lambda sentence: emit(Fallback(sentence)))
        parts.begin_with(STEPS, self.accumulate)
        return Trainee(
            original=original,
            lessons=lessons,
            places=places,
            steps=steps,
            learning_rate=kind.learning_rate if self.learning_rate is None else self.learning_rate,
            warmup=max(1, round(self.warmup_share * steps)),
            checks=self.checks,
            autocast=self.autocast(next(original.parameters()).device),
            recompute=self.recompute,
            parts=parts,
            seed=self.seed,
        )


@dataclass(frozen=True, slots=True)
class StagesDone:
    """What a run has come to."""

    curves: Mapping[str, Sequence[Point]]
    """By stage."""
    seconds: float

    @property
    def first(self) -> Point:
        """Return where learning began."""
        return next(iter(self.curves.values()))[0]

    @property
    def last(self) -> Sequence[Point]:
        """Return the curve of the last stage."""
        return list(self.curves.values())[-1]


def train_stages(
    prepared: PreparedTraining, memory: Callable[[str], Memory | None], emit: Emit
) -> StagesDone:
    """Let a student learn, one stage after the other; it ends as the last stage keeps it.

    Args:
        prepared: The student and its stages.
        memory: (stage) -> what has how far it is.
        emit: Is told of it.

    Raises:
        ModelError: the loss isn't a number before anything is learned.
    """
    begun, curves = time.perf_counter(), dict[str, Sequence[Point]]()
    for stage in prepared.stages:
        stage.begin()
        recalled = memory(stage.name) if fellows() == 1 else SharedMemory(memory(stage.name))
        points = descend(stage.learning, stage.schedule, _reporter(stage, emit), recalled)
        _check_curve(stage, points, emit)
        curves[stage.name] = points
    return StagesDone(curves, time.perf_counter() - begun)


def _reporter(stage: TrainingStage, emit: Emit) -> Callable[[Point], None]:
    def report(point: Point) -> None:
        detail = f"loss {point.held_out:.4f} on held-out texts"
        emit(Progress(stage.name, point.step, stage.schedule.steps, detail))

    return report


def _check_curve(stage: TrainingStage, points: Sequence[Point], emit: Emit) -> None:
    if not math.isfinite(points[0].held_out):
        raise ModelError(
            f"The loss is {points[0].held_out} on held-out texts before anything is learned: the "
            "model, or its original, computes what are no numbers. `qtool inspect` looks at a "
            "checkpoint."
        )
    last = points[-1]
    if not math.isfinite(last.held_out) or not math.isfinite(last.trained or 0.0):
        emit(
            Notice(
                f"Stage {stage.name!r} diverged before step {last.step} of {stage.schedule.steps}: "
                "the last good state is kept. Lower --learning-rate, "
                f"{stage.schedule.learning_rate:g} now."
            )
        )
