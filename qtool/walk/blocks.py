"""The decoder blocks of a model, one at a time: weights come from disk, inputs from the cache.

The model object is built with parameters that take no memory. Only what feeds the first block is
filled in to capture its inputs; after that one block at a time is filled, run and emptied.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qtool.core.activations import fake_quantize
from qtool.errors import ModelError
from qtool.formats._dtypes import dtype_of
from qtool.modeling.config import parse_config, transformers_failures
from qtool.modeling.filling import empty_own, fill, fill_own, weightless
from qtool.modeling.source import ModelSource
from qtool.scheme import ActivationScheme
from qtool.walk.calls import Call, Calls, Note, Recorder
from qtool.walk.stand_in import Stop
from qtool.wording import reason


def _walk_dtype(source: ModelSource, device: str, dtype: str) -> torch.dtype:
    if dtype != "auto":
        return dtype_of(dtype)
    if not device.startswith("cuda"):
        return torch.float32
    first = next(source.block_linears())
    stored = source.spec(f"{first}.weight").dtype
    return torch.bfloat16 if stored == "BF16" else torch.float16


class BlockModel:
    """The empty model and what its blocks are called with."""

    def __init__(self, source: ModelSource, device: str, *, dtype: str = "auto") -> None:
        """Build the model without weights.

        Args:
            source: Where the weights are.
            device: Where blocks run.
            dtype: In which they run. `auto`: in float32 on a CPU; on a card in bfloat16 if the
                weights are stored so, because such a model's activations may leave the range of
                float16, else in float16.

        Raises:
            ModelError: transformers can't build it.
        """
        import transformers  # slow

        self.source, self.device = source, device
        run_dtype = _walk_dtype(source, device, dtype)
        config = parse_config(source.config, source.directory)
        with transformers_failures(f"transformers can't build {source.directory}"), weightless():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=run_dtype)
        self._model = model.eval()
        self._blocks = model.get_submodule(source.adapter.blocks)
        self._calls = Calls()

    @torch.no_grad()
    def capture(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Run everything before the first block.

        Args:
            batches: Tokens, each (samples, length) int64.

        Returns:
            Inputs of the first block, each (samples, length, width), on the CPU.
        """
        with self._filled():
            first = self.load(0)
            calls: list[tuple[Tensor, Call]] = []
            rest: list[tuple[Any, ...] | None] = []

            def note(hidden: Tensor, call: Call) -> tuple[Any, ...] | None:
                if not rest:  # what a block returns is seen once, on a block that runs
                    rest.append(first.rest_of_output(hidden, call))
                calls.append((hidden, call))
                return rest[0]

            hidden = []
            with self._recorded(note):
                for tokens in batches:
                    calls.clear()
                    with failures_of_its_code(str(self.source.directory)):
                        self._model.base_model(tokens.to(self.device), use_cache=False)
                    hidden.append(calls[0][0].cpu())
                    self._calls.add([call for _, call in calls])
        return hidden

    @contextmanager
    def _recorded(self, note: Note) -> Iterator[None]:
        """Put a recorder in the place of each block."""
        blocks = list(self._blocks)
        for index, block in enumerate(blocks):
            self._blocks[index] = Recorder(block, note)
        try:
            yield
        finally:
            for index, block in enumerate(blocks):
                self._blocks[index] = block

    @contextmanager
    def _filled(self) -> Iterator[None]:
        """Fill all that runs beside the blocks, and empty it again."""
        skipped = {self._model.get_output_embeddings()}
        outside = {
            name: module
            for name, module in self._model.named_modules()
            if module not in skipped and not f"{name}.".startswith(self.source.adapter.blocks + ".")
        }
        for name, module in outside.items():
            fill_own(module, name, self.source, self.device)
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)
        yield
        for module in outside.values():
            empty_own(module)

    def load(self, index: int) -> "Block":
        """Fill one block; drop the result to free its memory."""
        block = deepcopy(self._blocks[index])
        prefix = f"{self.source.adapter.blocks}.{index}"
        fill(block, prefix, self.source, self.device)
        return Block(block, prefix, self._calls.of(index))


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


class Block:
    """One filled decoder block."""

    def __init__(self, module: nn.Module, name: str, calls: tuple[Call, ...]) -> None:
        self._module, self._name, self._calls = module, name, calls
        self._device = next(module.parameters()).device
        self._quantizing: dict[str, RemovableHandle] = {}

    def copy(self) -> "Block":
        """Return a block with weights of its own."""
        return Block(deepcopy(self._module), self._name, self._calls)

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
        return self.learn(hidden, batch)

    def learn(self, hidden: Tensor, batch: int) -> Tensor:
        """Do the same so that gradients can be taken."""
        output = self._call(hidden, self._calls[batch])
        return output[0] if isinstance(output, tuple) else output

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
        output = self._call(hidden, call)
        return output[1:] if isinstance(output, tuple) else None

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
        seen: list[Tensor] = []

        def stop(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.append(arguments[0])
            raise Stop

        module = self._module.get_submodule(linear)
        with module.register_forward_pre_hook(stop, prepend=True), suppress(Stop):
            self.run(hidden, batch)
        if not seen:
            raise ModelError(f"{linear} was never called: its inputs can't be measured.")
        return seen[0].flatten(0, -2)

    @torch.no_grad()
    def around(self, linear: str, hidden: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Run the whole block; return what goes into `linear` and what its output is added to.

        That sum must be the block's output: `linear` is the last one of the MLP.

        Returns:
            (tokens, in_features), and (tokens, width) float32.

        Raises:
            ModelError: the linear was never called.
        """
        seen: list[Tensor] = []

        def note(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.append(arguments[0])

        def note_output(_module: nn.Module, _arguments: tuple[Any, ...], output: Tensor) -> None:
            seen.append(output)

        module = self._module.get_submodule(linear)
        before = module.register_forward_pre_hook(note, prepend=True)
        with before, module.register_forward_hook(note_output):
            output = self.run(hidden, batch)
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
