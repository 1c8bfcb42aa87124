"""One filled decoder block: run as a whole, up to a linear, or for some samples of a batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qtool.core.activations import fake_quantize
from qtool.core.experts import SeparateExperts
from qtool.core.parts import Parts, most_parts, slices, within_memory
from qtool.errors import ModelError
from qtool.scheme import ActivationScheme
from qtool.walk.calls import Call, Side
from qtool.walk.stand_in import Stop
from qtool.wording import reason


@contextmanager
def failures_of_its_code(what: str) -> Iterator[None]:
    """Turn what a model's code raises into one sentence, but for too little memory."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError) as error:
        if "memory" in str(error):  # the caller knows what to do about that
            raise
        raise ModelError(
            f"{what} can't be run block by block ({type(error).__name__}: {reason(error)}). "
            "Quantize it without calibration data."
        ) from error


IN_BATCHES = "batches of samples are run"
"""Where memory is full in parts: a sentence begins so."""


def _most_parts(hidden: Tensor, call: Call) -> int:
    """Return in how many parts a batch can be run: one, if later blocks read what all leave."""
    return 1 if call.hands_on else most_parts(hidden)


class Block:
    """One filled decoder block."""

    def __init__(
        self,
        module: nn.Module,
        name: str,
        calls: tuple[Call, ...],
        parts: Parts | None,
        side: Side = "original",
    ) -> None:
        self._module, self._name, self._parts = module, name, parts
        self._of_both, self._side, self._calls = calls, side, tuple(one.of(side) for one in calls)
        self._device = next(module.parameters()).device
        self._quantizing: dict[str, RemovableHandle] = {}

    def copy(self, side: Side | None = None) -> "Block":
        """Return a block with weights of its own: of the other model, if that is named."""
        name, calls, parts, own = self.how_it_runs()
        return Block(deepcopy(self._module), name, calls, parts, side or own)

    def how_it_runs(self) -> tuple[str, tuple[Call, ...], Parts | None, Side]:
        """Return all else that a block like this one is made of."""
        return self._name, self._of_both, self._parts, self._side

    @property
    def module(self) -> nn.Module:
        """The block as transformers has it, to be changed by who owns it."""
        return self._module

    @torch.no_grad()
    def run(self, hidden: Tensor, batch: int) -> Tensor:
        """Return the block's output for one batch, on the block's device.

        Args:
            hidden: Input of the block, (samples, length, width).
            batch: Which of the captured batches it is: it decides the block's other arguments.

        Raises:
            ModelError: the block can't run by itself.
        """
        (output,) = self.in_parts(lambda part, call: (self.output(part, call),), hidden, batch)
        return output

    def output(self, hidden: Tensor, call: Call) -> Tensor:
        """Return what comes out of it for samples and what it is called with for these."""
        output = self._call(hidden, call)
        return output[0] if isinstance(output, tuple | list) else output

    def learn(self, hidden: Tensor, batch: int, samples: slice | None = None) -> Tensor:
        """Return the same so that gradients can be taken; of some samples, if they are named."""
        call = self._calls[batch]
        if samples is None:
            return self.output(hidden, call)
        return self.output(hidden[samples], call.of_samples(samples, len(hidden)))

    def in_parts(
        self, work: Callable[[Tensor, Call], Sequence[Tensor]], hidden: Tensor, batch: int
    ) -> tuple[Tensor, ...]:
        """Do something with a batch; if memory is full, with some of its samples after the others.

        Args:
            work: Of samples and what the block is called with for these; its results begin with
                what the first samples gave.
            hidden: Input of the block, (samples, length, width).
            batch: Which of the captured batches it is.
        """
        call, count = self._calls[batch], len(hidden)

        def run(parts: int) -> tuple[Tensor, ...]:
            if parts == 1:
                return tuple(work(hidden, call))
            found = [
                work(hidden[part], call.of_samples(part, count)) for part in slices(count, parts)
            ]
            return tuple(torch.cat(results) for results in zip(*found, strict=True))

        return within_memory(self._parts, IN_BATCHES, run, most=_most_parts(hidden, call))

    def alike(self, inputs: Sequence[Tensor]) -> list[int]:
        """Return which batches could stand in for the first: one shape, and equal arguments.

        Args:
            inputs: Of the first batches, each (samples, length, width).
        """
        first = self._calls[0].likeness()
        return [
            batch
            for batch, hidden in enumerate(inputs)
            if hidden.shape == inputs[0].shape and self._calls[batch].likeness() == first
        ]

    def rest_of_output(self, hidden: Tensor, call: Call) -> tuple[Any, ...] | None:
        """Return what the block returns beside the hidden states; None if it returns no tuple."""

        def rest(count: int) -> tuple[Any, ...] | None:
            if count == 1:
                output = self._call(hidden, call)
            else:
                some = slices(len(hidden), count)[0]
                output = self._call(hidden[some], call.of_samples(some, len(hidden)))
            return tuple(output[1:]) if isinstance(output, tuple | list) else None

        return within_memory(self._parts, IN_BATCHES, rest, most=_most_parts(hidden, call))

    def _call(self, hidden: Tensor, call: Call) -> Any:  # noqa: ANN401
        call = call.on(self._device)
        hidden = hidden.to(self._device, non_blocking=True)
        with failures_of_its_code(self._name):
            return self._module(hidden, *call.arguments, **call.keywords)

    @torch.no_grad()
    def inputs_of(self, linear: str, hidden: Tensor, batch: int) -> Tensor:
        """Run the block until `linear` is called and return its input: (tokens, in_features).

        It is what comes out of the linears before it, not yet quantized.

        Raises:
            ModelError: the linear was never called.
        """
        (inputs,) = self.in_parts(partial(self._inputs_of, linear), hidden, batch)
        return inputs

    def _inputs_of(self, linear: str, hidden: Tensor, call: Call) -> tuple[Tensor]:
        (arguments,) = self._stopped(linear, hidden, call)
        return (arguments[0].flatten(0, -2),)

    @torch.no_grad()
    def tokens_of(self, experts: str, hidden: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Run the block until experts are called; return their tokens, and who gets which.

        Args:
            experts: Dotted name of the module, in the block.
            hidden: Input of the block, (samples, length, width).
            batch: Which of the captured batches it is.

        Returns:
            (tokens, width), and (tokens, k) int64: as `SeparateExperts.seen` gives them.

        Raises:
            ModelError: the experts were never called.
        """
        module = self._module.get_submodule(experts)
        assert isinstance(module, SeparateExperts)

        def run(part: Tensor, call: Call) -> tuple[Tensor, Tensor]:
            (arguments,) = self._stopped(experts, part, call)
            return module.seen(*arguments)

        tokens, index = self.in_parts(run, hidden, batch)
        return tokens, index

    def _stopped(self, name: str, hidden: Tensor, call: Call) -> list[tuple[Any, ...]]:
        """Run the block until a module is called; return what it is called with."""
        seen: list[tuple[Any, ...]] = []

        def stop(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.append(arguments)
            raise Stop

        module = self._module.get_submodule(name)
        with module.register_forward_pre_hook(stop, prepend=True), suppress(Stop):
            self.output(hidden, call)
        if not seen:
            raise ModelError(f"{name} was never called: its inputs can't be measured.")
        return seen

    @torch.no_grad()
    def around(self, linear: str, hidden: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Run the whole block; return what goes into `linear` and what its output is added to.

        That sum must be the block's output: `linear` is the last one of the MLP.

        Returns:
            (tokens, in_features), and (tokens, width) float32.

        Raises:
            ModelError: the linear was never called.
        """
        inputs, residual = self.in_parts(partial(self._around, linear), hidden, batch)
        return inputs, residual

    def _around(self, linear: str, hidden: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []

        def note(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.append(arguments[0])

        def note_output(_module: nn.Module, _arguments: tuple[Any, ...], output: Tensor) -> None:
            seen.append(output)

        module = self._module.get_submodule(linear)
        before = module.register_forward_pre_hook(note, prepend=True)
        with before, module.register_forward_hook(note_output):
            output = self.output(hidden, call)
        if not seen:
            raise ModelError(f"{linear} was never called: its inputs can't be measured.")
        inputs, added = seen[:2]
        residual = output.flatten(0, -2).float() - added.flatten(0, -2).float()
        return inputs.flatten(0, -2), residual

    def set_weight(self, linear: str, weight: Tensor, *, transposed: bool) -> None:
        """Replace the weight (out_features, in_features) of a linear."""
        parameter = self._module.get_submodule(linear).get_parameter("weight")
        parameter.copy_(weight.T if transposed else weight)

    def set_bias(self, linear: str, bias: Tensor) -> None:
        """Replace the bias (out_features,) of a linear that has one."""
        self._module.get_submodule(linear).get_parameter("bias").copy_(bias)

    def quantize_inputs(self, linear: str, scheme: ActivationScheme | None) -> None:
        """Let a linear see its inputs as `scheme` leaves them; None: as they are."""
        if linear in self._quantizing:
            self._quantizing.pop(linear).remove()
        if scheme is None:
            return

        def quantize(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return (fake_quantize(arguments[0], scheme), *arguments[1:])

        module = self._module.get_submodule(linear)
        self._quantizing[linear] = module.register_forward_pre_hook(quantize)
