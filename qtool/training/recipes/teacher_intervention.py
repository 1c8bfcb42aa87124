"""Teacher Intervention (EACL 2023, arXiv 2302.11812): clean signals first, then as usual.

In a short first stage the original's signal takes the place of the student's inside each block, so
that each part learns from inputs that no part before it has disturbed. Then Adam begins anew, and
the student learns as by `distillation`. Modes and the gradual schedule are the paper's; those of
the MLP, and of both, are ours, for decoders.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field

from qtool.training.descent import Learning
from qtool.training.recipes import PreparedTraining, Trainee, Training, TrainingStage
from qtool.training.recipes._student import FollowOptions, begin_student, schedule_of
from qtool.training.taps import Signal, intervene

Intervention = Literal["attention-output", "context", "map", "mlp-output", "both"]
MODES: dict[Intervention, tuple[frozenset[Signal], frozenset[int]]] = {
    "attention-output": (frozenset({"attention"}), frozenset({0, 1, 2})),
    "context": (frozenset({"context"}), frozenset({0, 1, 2})),
    "map": (frozenset({"map"}), frozenset({0, 1})),
    "mlp-output": (frozenset({"mlp"}), frozenset()),
    "both": (frozenset({"attention", "mlp"}), frozenset({0, 1, 2})),
}
"""What is the original's; and which of queries, keys and values, in this order, pass no gradient on
to the block's input, so that they learn from the losses of their own attention alone."""
GRADUAL: tuple[tuple[Intervention, float], ...] = (
    ("attention-output", 1 / 6),
    ("context", 1 / 3),
    ("map", 1.0),
)
"""Modes, each until its share of the first stage is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterventionOptions(FollowOptions):
    """What counts, what learns, and where the original intervenes."""

    mode: Literal["gradual"] | Intervention = "gradual"
    """What is the original's in the first stage; gradual: attention's output for a sixth of it,
    then what the map gathers for another, then the map."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Of all steps, in the first stage."""


def mode_at(options: InterventionOptions, step: int, steps: int) -> Intervention:
    """Return the mode of a step of the first stage, which has so many.

    Gradual: the two switches are at the first steps from 1/6 and 1/3 on.
    """
    if options.mode != "gradual":
        return options.mode
    return next(mode for mode, until in GRADUAL if step < until * steps)


def _prepare(trainee: Trainee, options: InterventionOptions) -> PreparedTraining:
    follower = begin_student(trainee, options, taps=True)
    following, vectors = follower.following, list(follower.vectors.values())
    first = max(1, math.ceil(options.share * trainee.steps))

    def intervened(step: int) -> None:
        intervene(following.taps, *MODES[mode_at(options, step, first)])

    def begin_alone() -> None:
        intervene(following.taps, frozenset())

    def learn(feed: Callable[[int], None]) -> Learning:
        learning = following.learning(trainee.lessons, vectors, feed, trainee.parts)

        def look() -> float:
            begin_alone()  # what is stored has nobody to intervene; `feed` comes before each step
            return learning.held_out()

        return replace(learning, held_out=look)

    stages = [
        TrainingStage(
            name="intervention",
            learning=learn(intervened),
            schedule=schedule_of(trainee, options, first, keeps="last"),
            begin=begin_alone,
        ),
        TrainingStage(
            name="train",
            learning=learn(lambda _step: None),
            schedule=schedule_of(trainee, options, max(1, trainee.steps - first)),
            begin=begin_alone,
        ),
    ]
    return PreparedTraining(student=following.student, stages=stages, results=follower.results)


TRAINING = Training(
    summary="Inside each block the original's signal takes the student's place, for a while.",
    options=InterventionOptions,
    prepare=_prepare,
    learning_rate=1.5e-3,
)
