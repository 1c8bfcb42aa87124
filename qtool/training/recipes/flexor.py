"""FleXOR (NeurIPS 2020, arXiv 2009.04126): planes that XOR gates make of fewer bits learn.

Stored bits follow latent values by FleXOR's gradient, whose slope sharpens in the first steps as
the paper's S_tanh does. That learning begins at the stored bits nearest to the original, follows
the original, and has scales of groups, is ours: the paper learns labels from random bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.core.xor_networks import tapped_network
from qtool.errors import SchemeError
from qtool.formats._encoded_starts import MOST_TRIED_INPUTS, encrypted_start
from qtool.training.recipes import PreparedTraining, Trainee, Training, TrainingStage
from qtool.training.recipes._student import FollowOptions, begin_student, schedule_of
from qtool.training.student import learned_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexorOptions(FollowOptions):
    """What is stored, what counts, and what learns."""

    planes: Annotated[int, Field(ge=1, le=8)] = 2
    inputs: Annotated[int, Field(ge=1, le=MOST_TRIED_INPUTS)] = 8
    """Stored bits of a slice, N_in."""
    outputs: Annotated[int, Field(ge=1, le=1024)] = 10
    """Bits of a plane that they make, N_out: planes * inputs / outputs bits per weight."""
    taps: Annotated[int, Field(ge=1, le=MOST_TRIED_INPUTS)] = 2
    """Inputs that an output is the XOR of, N_tap."""
    first_sharpness: Annotated[float, Field(gt=0, le=1e4)] = 5.0
    """S_tanh in the first step."""
    sharpness: Annotated[float, Field(gt=0, le=1e4)] = 10.0
    """S_tanh from the end of its warm-up on."""
    sharpening: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of the steps in which it gets there, along a line."""


def sharpness_at(options: FlexorOptions, step: int, steps: int) -> float:
    """Return S_tanh in a step of so many."""
    until = options.sharpening * steps
    done = min(1.0, step / until) if until else 1.0
    return options.first_sharpness + (options.sharpness - options.first_sharpness) * done


def _networks(options: FlexorOptions, seed: int) -> Tensor:
    """Return a network of each plane, the same for all layers: (planes, outputs, inputs) uint8.

    Raises:
        SchemeError: there is none like that.
    """
    if options.inputs > options.outputs or options.taps > options.inputs:
        raise SchemeError(
            f"{options.taps} taps into {options.inputs} inputs make {options.outputs} outputs; no "
            "more taps than inputs, and no more inputs than outputs, are meant."
        )
    generator = torch.Generator().manual_seed(seed)
    size = options.outputs, options.inputs, options.taps
    return torch.stack([tapped_network(*size, generator) for _ in range(options.planes)])


def _starts(trainee: Trainee, options: FlexorOptions) -> dict[str, QuantizedTensor]:
    """Return where layers begin: encrypted ones as they are, of others the nearest."""
    networks, starts = _networks(options, trainee.seed), dict[str, QuantizedTensor]()
    for name, tensor in trainee.layers.items():
        if tensor.scheme.code is not None and codec(tensor.format).trainable is not None:
            starts[name] = tensor
            continue
        weight = trainee.original.get_submodule(name).get_parameter("weight").detach()
        scheme = replace(tensor.scheme, num_bits=options.planes, rows=(), code=None)
        found = encrypted_start(weight.float().cpu(), networks, scheme)
        parts = {part: value.to(weight.device) for part, value in found.parts.items()}
        starts[name] = replace(found, parts=parts)
    return starts


def _notes(starts: Mapping[str, QuantizedTensor]) -> dict[str, Any]:
    """Return what planes take where they are stored, and where they run, in bits per weight."""
    weights = sum(
        tensor.shape.out_features * tensor.shape.in_features for tensor in starts.values()
    )
    stored = sum(8 * tensor.parts["encrypted_planes"].nbytes for tensor in starts.values())
    running = sum(
        tensor.scheme.num_bits * tensor.shape.out_features * tensor.shape.in_features
        for tensor in starts.values()
    )
    return {"plane_bits_stored": stored / weights, "plane_bits_running": running / weights}


def _prepare(trainee: Trainee, options: FlexorOptions) -> PreparedTraining:
    starts = _starts(trainee, options)
    follower = begin_student(replace(trainee, layers=starts), options)
    layers = [layer for _, layer in learned_layers(follower.following.student)]

    def sharpen(step: int) -> None:
        for layer in layers:
            layer.sharpness = sharpness_at(options, step, trainee.steps)

    learning = follower.following.learning(
        trainee.lessons, list(follower.vectors.values()), sharpen, trainee.parts
    )
    stage = TrainingStage(
        name="train", learning=learning, schedule=schedule_of(trainee, options, trainee.steps)
    )
    return PreparedTraining(
        student=follower.following.student,
        stages=[stage],
        results=follower.results,
        notes=lambda: _notes(starts),
    )


TRAINING = Training(
    summary="Planes are stored in fewer bits than they have, 1.6 per weight, and these bits learn.",
    options=FlexorOptions,
    prepare=_prepare,
    learning_rate=1.5e-3,
)
