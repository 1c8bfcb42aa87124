"""Modulated regularization frequency (arXiv 2105.01875): compressed every p steps, else free.

Weights learn as they are, without straight-through gradients; every p steps each becomes what its
compressed form is. The paper learns labels; that this follows the original is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qtool.base import CausalModel, QuantizedTensor
from qtool.core.compressions import decayed, in_planes_of, movement, pruned
from qtool.core.sequential_code import MEMORY, serial_network
from qtool.formats._encoded_starts import sparse_code, sparse_start, sparse_values
from qtool.formats.binary_coding import encode_binary
from qtool.scheme import Shape2D, WeightScheme
from qtool.training.recipes import PreparedTraining, Trainee, Training, TrainingStage
from qtool.training.recipes._student import FollowOptions, begin_student, schedule_of
from qtool.training.student import make_student


@dataclass(frozen=True, slots=True, kw_only=True)
class PnrOptions(FollowOptions):
    """What is done to weights, how often, and what counts."""

    period: Annotated[int, Field(ge=1, le=10**9)] = 10
    """Steps between two compressions, p."""
    compression: Literal["quantize", "prune", "decay"] = "quantize"
    """`quantize`: to the checkpoint's planes; `prune`: the smallest weights become zero; `decay`:
    weights shrink. What is stored has the checkpoint's planes; of pruned weights, sparse ones."""
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """Share that pruning makes zero."""
    memory: Annotated[int, Field(ge=MEMORY[0], le=MEMORY[-1])] = 10
    """Bits that the registers of the decoder of what is pruned hold; each more doubles the time of
    the search, at the end."""
    saliency: Literal["magnitude", "movement"] = "magnitude"
    """Which weights pruning leaves: the largest, or those that have most moved away from zero
    (movement pruning); before anything has moved, the largest."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    """Of a weight, in one step; p steps at once have p times of it."""


class FreeLinear(nn.Module):
    """Stands in for a linear: a dense weight that learns, in units of its own size."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, watched: bool = False) -> None:
        """Begin at a weight.

        Args:
            weight: (out_features, in_features).
            bias: Of the linear that is replaced.
            watched: How its values move is summed up.
        """
        super().__init__()
        self.begun, self.bias = weight.detach().float(), bias
        self.unit = float(self.begun.square().mean().sqrt()) or 1.0
        self.move = nn.Parameter(torch.zeros_like(self.begun))
        score = nn.Parameter(torch.zeros_like(self.begun), requires_grad=False)
        self.score = score if watched else None
        """What has moved; a parameter, so that a run that was stopped finds it again."""

    def weight(self) -> Tensor:
        """Return the weight, (out_features, in_features) float32."""
        return self.begun + self.unit * self.move

    def state(self) -> list[nn.Parameter]:
        """Return what a run that was stopped has to find again."""
        return [self.move] if self.score is None else [self.move, self.score]

    @torch.no_grad()
    def watch(self) -> None:
        """Sum up how a step has moved the values, before its gradient is gone."""
        if self.score is not None and self.move.grad is not None:
            self.score.add_(movement(self.weight() / self.unit, self.move.grad))

    @torch.no_grad()
    def pruned(self, sparsity: float) -> Tensor:
        """Return the weight without what matters least."""
        moved = self.score is not None and bool(self.score.any())
        return pruned(self.weight(), sparsity, self.score if moved else None)

    @torch.no_grad()
    def become(self, weight: Tensor) -> None:
        """Take another weight."""
        self.move.copy_((weight - self.begun) / self.unit)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W.T + bias: (..., in_features) -> (..., out_features)."""
        weight = self.weight()
        if not torch.is_autocast_enabled(x.device.type):
            weight = weight.to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)


@dataclass(slots=True)
class CompressedLayers:
    """The layers that learn, and what is done to them."""

    options: PnrOptions
    layers: dict[str, FreeLinear]
    schemes: dict[str, WeightScheme]

    def begin(self) -> None:
        """Make each weight what is stored of it: of the original itself nothing could be learned.

        It is no distance from itself.
        """
        for name, layer in self.layers.items():
            layer.become(self.seen(name))

    def compress(self) -> None:
        """Make each weight what the regularization makes of it."""
        for name, layer in self.layers.items():
            weight = layer.weight().detach()
            if self.options.compression == "decay":
                layer.become(decayed(weight, self.options.decay, self.options.period))
            elif self.options.compression == "prune":
                layer.become(layer.pruned(self.options.sparsity))
            else:
                layer.become(in_planes_of(weight, self.schemes[name])[2])

    def stored(self, name: str) -> QuantizedTensor:
        """Return a weight as it is stored."""
        weight, scheme = self.layers[name].weight().detach(), self.schemes[name]
        shape = Shape2D(*weight.shape)
        if self.options.compression == "prune":
            sparse = self.layers[name].pruned(self.options.sparsity).cpu()
            code = sparse_code(self.options.sparsity, self.options.memory)
            size = code.num_outputs, code.num_inputs, code.registers
            network = serial_network(*size, torch.Generator().manual_seed(0))
            own = replace(scheme, code=code, symmetric=True)
            return sparse_start(sparse, sparse != 0, network, own)
        codes, theta, _ = in_planes_of(weight, scheme)
        return encode_binary(codes, theta[..., :-1], theta[..., -1], scheme, shape)

    def seen(self, name: str) -> Tensor:
        """Return what a weight is once it is stored, without searching for encoded bits."""
        weight, scheme = self.layers[name].weight().detach(), self.schemes[name]
        if self.options.compression != "prune":
            return in_planes_of(weight, scheme)[2]
        sparse = self.layers[name].pruned(self.options.sparsity)
        return sparse_values(sparse, sparse != 0, replace(scheme, symmetric=True))

    def as_stored(self, look: Callable[[], float]) -> float:
        """Look at layers as they would be stored, and leave them as they are."""
        before = {name: layer.move.detach().clone() for name, layer in self.layers.items()}
        self.begin()
        try:
            return look()
        finally:
            for name, layer in self.layers.items():
                with torch.no_grad():
                    layer.move.copy_(before[name])


def _free_student(
    trainee: Trainee, options: PnrOptions
) -> tuple[CausalModel, dict[str, FreeLinear]]:
    """Return a student whose quantized layers are dense again, and learn."""
    student = make_student(trainee.original, {}, moves_codes=False)
    watched = options.compression == "prune" and options.saliency == "movement"
    layers = {}
    for name in trainee.layers:
        linear = student.get_submodule(name)
        weight, bias = linear.get_parameter("weight"), getattr(linear, "bias", None)
        layers[name] = FreeLinear(weight, bias, watched=watched)
        parent, _, child = name.rpartition(".")
        setattr(student.get_submodule(parent), child, layers[name])
    return student, layers


def _prepare(trainee: Trainee, options: PnrOptions) -> PreparedTraining:
    student, free = _free_student(trainee, options)
    plain = {
        name: replace(each.scheme, rows=(), code=None) for name, each in trainee.layers.items()
    }
    layers = CompressedLayers(options, free, plain)
    follower = begin_student(trainee, options, student=student)
    vectors = list(follower.vectors.values())
    learning = follower.following.learning(
        trainee.lessons, vectors, lambda _step: None, trainee.parts
    )
    look = learning.held_out

    def after(step: int) -> None:
        for layer in free.values():
            layer.watch()
        if step % options.period == 0:
            layers.compress()

    learning = replace(
        learning,
        held_out=lambda: layers.as_stored(look),
        parameters=[one for layer in free.values() for one in layer.state()],
        after=after,
    )
    stage = TrainingStage(
        name="train",
        learning=learning,
        schedule=schedule_of(trainee, options, trainee.steps),
        begin=layers.begin,
    )

    def results() -> dict[str, QuantizedTensor | Tensor]:
        return {**{name: layers.stored(name) for name in free}, **follower.results()}

    return PreparedTraining(student=student, stages=[stage], results=results)


TRAINING = Training(
    summary="Dense weights learn, and are compressed every p steps: pruned, quantized or decayed.",
    options=PnrOptions,
    prepare=_prepare,
    learning_rate=3e-3,
)
