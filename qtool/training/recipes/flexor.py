"""FleXOR (NeurIPS 2020, arXiv 2009.04126): planes that XOR gates make of fewer bits learn.

Stored bits follow latent values by FleXOR's gradient, whose slope sharpens in the first steps as
the paper's S_tanh does. That learning begins at the stored bits nearest to the original, follows
the original, and has scales of groups, is ours: the paper learns labels from random bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.core.xor_networks import tapped_network
from qtool.errors import RecipeError, SchemeError
from qtool.formats._encoded_starts import MOST_TRIED_INPUTS, encrypted_start
from qtool.recipe.matching import matches
from qtool.training.recipes import PreparedTraining, Trainee, Training, TrainingStage
from qtool.training.recipes._student import FollowOptions, begin_student, schedule_of
from qtool.training.student import learned_layers
from qtool.wording import list_names

LAYERS_SHOWN = 3
"""Layers that an error names."""


Planes = Annotated[int, Field(ge=1, le=8)]
Inputs = Annotated[int, Field(ge=1, le=MOST_TRIED_INPUTS)]
Outputs = Annotated[int, Field(ge=1, le=1024)]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkOverride:
    """What differs for the layers whose dotted name matches."""

    match: str
    """Glob on the layer's dotted name, such as '*.down_proj'; the first match wins."""
    planes: Planes | None = None
    inputs: Inputs | None = None
    outputs: Outputs | None = None
    taps: Inputs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexorOptions(FollowOptions):
    """What is stored, what counts, and what learns."""

    planes: Planes = 2
    inputs: Inputs = 8
    """Stored bits of a slice, N_in."""
    outputs: Outputs = 10
    """Bits of a plane that they make, N_out: planes * inputs / outputs bits per weight."""
    taps: Inputs = 2
    """Inputs that an output is the XOR of, N_tap."""
    overrides: tuple[NetworkOverride, ...] = ()
    """Of single layers, by their names."""
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


@dataclass(frozen=True, slots=True)
class _Size:
    """Of the networks of a layer, one for each plane."""

    planes: int
    inputs: int
    outputs: int
    taps: int

    def networks(self, seed: int) -> Tensor:
        """Return them, (planes, outputs, inputs) uint8: the same for all layers of this size.

        Raises:
            SchemeError: there is none like that.
        """
        if self.inputs > self.outputs or self.taps > self.inputs:
            raise SchemeError(
                f"{self.taps} taps into {self.inputs} inputs make {self.outputs} outputs; no more "
                "taps than inputs, and no more inputs than outputs, are meant."
            )
        generator = torch.Generator().manual_seed(seed)
        size = self.outputs, self.inputs, self.taps
        return torch.stack([tapped_network(*size, generator) for _ in range(self.planes)])


def network_size(layer: str, options: FlexorOptions) -> _Size:
    """Return what the networks of a layer are, by its dotted name."""
    found = next((one for one in options.overrides if matches(layer, one.match)), None)

    def value(key: str) -> int:
        own = getattr(found, key, None)
        return int(getattr(options, key) if own is None else own)

    return _Size(*(value(key.name) for key in fields(_Size)))


def _checked_sizes(trainee: Trainee, options: FlexorOptions) -> dict[str, _Size]:
    """Return the networks' sizes of all layers.

    Raises:
        RecipeError: an override matches none.
    """
    for one in options.overrides:
        if not any(matches(layer, one.match) for layer in trainee.layers):
            some = list_names(list(trainee.layers)[:LAYERS_SHOWN])
            raise RecipeError(
                f"--set overrides: {one.match!r} matches no quantized layer. Layers are {some} ..."
            )
    return {layer: network_size(layer, options) for layer in trainee.layers}


def _starts(trainee: Trainee, options: FlexorOptions) -> dict[str, QuantizedTensor]:
    """Return where layers begin: encrypted ones as they are, of others the nearest."""
    sizes, starts = _checked_sizes(trainee, options), dict[str, QuantizedTensor]()
    networks = {size: size.networks(trainee.seed) for size in sizes.values()}
    for name, tensor in trainee.layers.items():
        if tensor.scheme.code is not None and codec(tensor.format).trainable is not None:
            starts[name] = tensor
            continue
        weight = trainee.original.get_submodule(name).get_parameter("weight").detach()
        size = sizes[name]
        scheme = replace(tensor.scheme, num_bits=size.planes, rows=(), code=None)
        found = encrypted_start(weight.float().cpu(), networks[size], scheme)
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
