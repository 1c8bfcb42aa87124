"""A model whose quantized weights learn: its modules are the original's, but for those layers."""

import copy
from collections.abc import Container, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qtool.base import CausalModel, QuantizedTensor, Trainable
from qtool.checkpoint.manifest import codec
from qtool.core import grouping
from qtool.core.activations import fake_quantize
from qtool.core.learned import moved_codes, planes_values
from qtool.errors import SchemeError
from qtool.scheme import ActivationScheme

MEMORY_BOUND = 1_000_000_000
"""Parameters. A step of fewer is bound by its launches, and is captured; of more by memory, and
blocks are recomputed."""
LATENT_START = 0.1
"""How far from zero the latent value of a stored bit begins: the slope of tanh is felt there."""


class LearnedLinear(nn.Module):
    """Stands in for a linear: its weight is a quantized one whose parameters, and codes, learn."""

    def __init__(self, tensor: QuantizedTensor, bias: Tensor | None, *, moves_codes: bool) -> None:
        """Begin at a quantized weight.

        Args:
            tensor: The weight.
            bias: Of the linear that is replaced.
            moves_codes: Let each code follow a latent value: its level, and a shift that learns.
        """
        super().__init__()
        self.scheme, self.shape, self.bias = tensor.scheme, tensor.shape, bias
        trainable = codec(tensor.format).trainable
        if trainable is None:
            raise SchemeError(
                f"Weights of format {tensor.format} can't be tuned. Leave out tuning, or use a "
                "method that writes another format."
            )
        self.start = start = trainable(tensor)
        self.codes = start.codes.contiguous()
        """Where they are now; a refinement moves them in place."""
        self.watched: Tensor | None = None
        """In the shape of codes: gets the gradient with respect to a step of each code."""
        self.activation: ActivationScheme | None = None
        """How its inputs are quantized; gradients go through as if they weren't."""
        zeros = {name: torch.zeros_like(value) for name, value in start.parameters.items()}
        self.moves = nn.ParameterDict({name: nn.Parameter(zero) for name, zero in zeros.items()})
        """How far each parameter has moved, in its units."""
        self.sharpness = 10.0
        """Of the slope that latent values of stored bits have."""
        shifts = _latent_start(start) if moves_codes else None
        self.shifts = None if shifts is None else nn.Parameter(shifts)
        """How far each latent value is from the level where it began, in steps of codes; of stored
        bits, of which signs are made: the latent value itself."""

    def parameters_now(self) -> dict[str, Tensor]:
        """Return the learned parameters as the codec knows them."""
        begun, units = self.start.parameters, self.start.units
        return {name: begun[name] + units[name] * move for name, move in self.moves.items()}

    @torch.no_grad()
    def codes_now(self, scales: Tensor, offsets: Tensor) -> Tensor:
        """Return the codes: those of the levels nearest to the latent values."""
        if self.shifts is None:
            return self.codes
        if self.start.signs is not None:
            return (self.shifts >= 0).to(torch.uint8)
        return moved_codes(scales, offsets, self.codes, self.shifts)

    def weight(self) -> Tensor:
        """Return the weight, (out_features, in_features) float32, differentiable."""
        now = self.start.planes(self.parameters_now())
        if self.start.signs is not None:
            values = self._made_values(*now)
        else:
            values = planes_values(
                *now, self.codes_now(*now), self.shifts if self.watched is None else self.watched
            )
        joined = grouping.join(values, self.scheme.grouped_length(self.shape))
        return grouping.to_rows(joined, self.scheme)

    def _made_values(self, scales: Tensor, offsets: Tensor) -> Tensor:
        """Return what signs make that are made of stored bits."""
        assert self.start.signs is not None
        latent = self.codes.float() - 0.5 if self.shifts is None else self.shifts
        signs = self.start.signs(latent, self.sharpness)
        return offsets.unsqueeze(-1) + (signs * scales.unsqueeze(-1)).sum(0)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W.T + bias: (..., in_features) -> (..., out_features)."""
        weight = self.weight()
        if self.activation is not None:
            x = x + (fake_quantize(x.detach(), self.activation) - x.detach())
        if not torch.is_autocast_enabled(x.device.type):
            weight = weight.to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)

    @torch.no_grad()
    def stored(self) -> QuantizedTensor:
        """Return the weight as a checkpoint stores it."""
        now = self.parameters_now()
        return self.start.stored(now, self.codes_now(*self.start.planes(now)))


def _latent_start(start: Trainable) -> Tensor:
    """Return where latent values begin."""
    if start.signs is None:
        return torch.zeros(start.codes.shape, device=start.codes.device)
    return (start.codes.float() * 2 - 1) * LATENT_START


def make_student(
    original: CausalModel,
    layers: Mapping[str, QuantizedTensor],
    *,
    moves_codes: bool,
) -> CausalModel:
    """Return a model that shares every tensor with the original, but for the layers that learn.

    Args:
        original: Of transformers, dense.
        layers: Linears by module name.
        moves_codes: As for `LearnedLinear`.
    """
    original.requires_grad_(requires_grad=False)
    shared = {id(tensor): tensor for tensor in (*original.parameters(), *original.buffers())}
    student = copy.deepcopy(original, shared)
    install_layers(student, layers, moves_codes=moves_codes)
    return student


def recompute_blocks(student: CausalModel, blocks: str) -> None:
    """Let each block keep its input alone for the way back, and run once more there.

    Then a step holds the weights and activations of one block, not of all; it takes a third longer.
    Source: Chen et al. 2016 (arXiv 1604.06174).

    Args:
        student: See `make_student`.
        blocks: Dotted name of the list of its blocks.
    """
    for block in student.get_submodule(blocks).children():
        forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = forward


def install_layers(
    module: nn.Module, layers: Mapping[str, QuantizedTensor], *, moves_codes: bool
) -> None:
    """Put layers that learn in the place of linears, by their names in the module."""
    for name, tensor in layers.items():
        parent, _, child = name.rpartition(".")
        bias = getattr(module.get_submodule(name), "bias", None)
        new = LearnedLinear(tensor, bias, moves_codes=moves_codes)
        setattr(module.get_submodule(parent), child, new)


def learned_layers(student: nn.Module) -> Iterator[tuple[str, LearnedLinear]]:
    """Yield the layers that learn, by module name."""
    for name, module in student.named_modules():
        if isinstance(module, LearnedLinear):
            yield name, module


def quantize_inputs(student: nn.Module, schemes: Mapping[str, ActivationScheme | None]) -> None:
    """Let layers that learn see inputs as they will be quantized, by module name."""
    for name, layer in learned_layers(student):
        layer.activation = schemes[name]


def stored_parts(student: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what a checkpoint stores of the layers that learn, by module name and part."""
    for name, layer in learned_layers(student):
        yield from ((f"{name}.{part}", tensor) for part, tensor in layer.stored().parts.items())


def free_vectors(student: nn.Module, names: Container[str]) -> dict[str, nn.Parameter]:
    """Give the student norms and biases of its own that learn: one-dimensional parameters.

    Args:
        student: See `make_student`.
        names: Full names of those that may learn.

    Returns:
        By full name, float32; they stand in the modules of the student.
    """
    found = {}
    for name, value in list(student.named_parameters()):
        if value.dim() == 1 and value.is_floating_point() and name in names:
            path, _, key = name.rpartition(".")
            mine = nn.Parameter(value.detach().float().clone())
            setattr(student.get_submodule(path), key, mine)
            found[name] = mine
    return found


def fill_tables(student: CausalModel, tables: Mapping[str, QuantizedTensor]) -> None:
    """Give the student the quantized embedding and head, as dense weights of its own."""
    for name, tensor in tables.items():
        module = student.get_submodule(name)
        values = codec(tensor.format).dequantize(tensor, torch.float32).to(module.weight)
        was = module.weight
        for other in student.modules():  # a tied head has the same parameter
            if getattr(other, "weight", None) is was:
                other.weight = nn.Parameter(values, requires_grad=False)
