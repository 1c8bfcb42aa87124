"""The student that recipes over `Codec.trainable` share: layers, tables, norms and biases."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from qtool.base import CausalModel, QuantizedTensor
from qtool.core.experts import routes_tokens
from qtool.errors import ModelError
from qtool.training.following import Following
from qtool.training.recipes import Trainee
from qtool.training.schedule import Schedule
from qtool.training.student import (
    MEMORY_BOUND,
    fill_tables,
    free_vectors,
    learned_layers,
    make_student,
    recompute_blocks,
)
from qtool.training.taps import Signal, tap_blocks

LossWeight = Annotated[float, Field(ge=0, le=1e6)]


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowOptions:
    """What counts, and what learns."""

    logits: LossWeight = 1.0
    """LossWeight of KL to the original's predictions, in nats."""
    hidden: LossWeight = 1.0
    """LossWeight of the relative error of each block's output."""
    scores: LossWeight = 1.0
    """LossWeight of the relative error of attention before its softmax."""
    attention: LossWeight = 1.0
    """LossWeight of the relative error of what attention adds to the stream."""
    mlp: LossWeight = 0.0
    """LossWeight of the relative error of what the MLP adds to it."""
    code_rate: Annotated[float, Field(ge=0, le=1)] = 5e-3
    """What a first step moves latent codes by, in steps of codes; 0: codes stay."""
    norms: bool = True
    """Norms and biases learn too."""

    def signals(self) -> dict[Signal, float]:
        """Return the weights of signals inside blocks, without those that are 0."""
        weights: dict[Signal, float] = {
            "block": self.hidden,
            "scores": self.scores,
            "attention": self.attention,
            "mlp": self.mlp,
        }
        return {name: weight for name, weight in weights.items() if weight}


@dataclass(frozen=True, slots=True)
class Follower:
    """A student that begins at a checkpoint, and what of it is stored."""

    trainee: Trainee
    following: Following
    vectors: Mapping[str, nn.Parameter] = field(default_factory=dict)

    def results(self) -> dict[str, QuantizedTensor | Tensor]:
        """Return what a checkpoint stores of it now."""
        layers = learned_layers(self.following.student)
        vectors = {name: value.detach() for name, value in self.vectors.items()}
        return {name: layer.stored() for name, layer in layers} | vectors


def begin_student(
    trainee: Trainee,
    options: FollowOptions,
    *,
    taps: bool = False,
    steady: bool = False,
    student: CausalModel | None = None,
) -> Follower:
    """Return a student over `Codec.trainable` that begins at a checkpoint, and follows.

    Args:
        trainee: What a recipe was given.
        options: What counts, and what learns.
        taps: Blocks are tapped even if no loss looks at them.
        steady: Each step does what the last one did, so that a card may record it.
        student: Of the recipe's own making; None: layers over `Codec.trainable`.

    Raises:
        ModelError: nothing is quantized, or blocks can't be tapped.
        SchemeError: a format can't be trained.
    """
    if not trainee.layers:
        raise ModelError("No linear of the model's blocks is quantized: there is nothing to train.")
    if student is None:
        moves = options.code_rate > 0
        student = make_student(trainee.original, trainee.layers, moves_codes=moves)
    fill_tables(student, trainee.tables)
    vectors = free_vectors(student, trainee.kept)
    _take_kept(vectors, trainee.kept)
    signals = options.signals()
    both = [
        tap_blocks(model, trainee.places) if signals or taps else []
        for model in (student, trainee.original)
    ]
    for tap, source in zip(*both, strict=True):
        tap.source = source
    if trainee.recompute:
        recompute_blocks(student, trainee.places.blocks)
    following = Following(
        trainee.original,
        student,
        signals,
        options.logits,
        taps=both[0],
        sources=both[1],
        autocast=trainee.autocast,
        captured=steady and _is_captured(trainee, signals),
    )
    for vector in () if options.norms else vectors.values():
        vector.requires_grad = False
    return Follower(trainee, following, vectors if options.norms else {})


def _is_captured(trainee: Trainee, signals: Mapping[Signal, float]) -> bool:
    """Return whether a step can be one CUDA graph, and is bound by its launches otherwise."""
    original = trainee.original
    on_card = next(original.parameters()).device.type == "cuda"
    small = sum(value.numel() for value in original.parameters()) < MEMORY_BOUND
    plain = not signals and not trainee.recompute and not routes_tokens(original)
    return on_card and small and plain and trainee.lessons.one_shape


@torch.no_grad()
def _take_kept(vectors: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]) -> None:
    """Give norms and biases the values of the checkpoint, in which they may have been tuned."""
    for name, vector in vectors.items():
        vector.copy_(kept[name])


def schedule_of(trainee: Trainee, options: FollowOptions, steps: int, **more: object) -> Schedule:
    """Return how long and how fast a stage is: up, and along a line down to nothing."""
    values: dict[str, object] = {
        "steps": steps,
        "learning_rate": trainee.learning_rate,
        "code_rate": options.code_rate,
        "warmup": min(trainee.warmup, max(1, steps // 2)),
        "floor": 0.0,
        "falls": "line",
        "check_every": max(1, trainee.steps // trainee.checks),
        **more,
    }
    return Schedule(**values)  # type: ignore[arg-type]
