"""The decoder blocks of a model, one at a time: weights come from disk, inputs from the cache.

The model object is built with parameters that take no memory. Only what feeds the first block is
filled in to capture its inputs; after that one block at a time is filled, run and emptied.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qtool.errors import ModelError
from qtool.modeling.source import ModelSource


class Call(NamedTuple):
    """What a block is called with beside its input: masks, positions, rotary embeddings."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


@contextmanager
def _weightless() -> Iterator[None]:
    """Let modules built inside have parameters without memory, but real buffers."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None:
            empty = nn.Parameter(parameter.to("meta"), requires_grad=False)
            module._parameters[name] = empty

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def fill(module: nn.Module, prefix: str, source: ModelSource, device: str) -> None:
    """Read the parameters of a module from the source, in the dtype of the module."""
    for name, parameter in list(module.named_parameters()):
        parent, _, child = name.rpartition(".")
        value = source.read(f"{prefix}.{name}").to(device, parameter.dtype)
        module.get_submodule(parent)._parameters[child] = nn.Parameter(value, requires_grad=False)


class _Recorder(nn.Module):
    """Stands in for a block: notes what it is called with and returns its input."""

    def __init__(self, block: nn.Module, note: Callable[[Tensor, Call], None]) -> None:
        super().__init__()
        self._block = (block,)
        self._note = note

    def forward(self, hidden: Tensor, *arguments: Any, **keywords: Any) -> Tensor:  # noqa: ANN401
        self._note(hidden, Call(arguments, keywords))
        return hidden

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Answer for the block: models look at attributes such as its kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)


def _walk_dtype(source: ModelSource, device: str, dtype: str) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
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
        try:
            config = transformers.AutoConfig.from_pretrained(source.directory)
            with _weightless():
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=run_dtype)
        except Exception as error:  # transformers raises many unrelated types
            raise ModelError(f"transformers can't build {source.directory}: {error}") from error
        self._model = model.eval()
        self._blocks = model.get_submodule(source.adapter.blocks)
        self._calls: dict[tuple[int, ...], list[Call]] = {}

    @torch.no_grad()
    def capture(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Run everything before the first block.

        Args:
            batches: Tokens, each (samples, length) int64.

        Returns:
            Inputs of the first block, each (samples, length, width), on the CPU.
        """
        blocks = list(self._blocks)
        calls: list[tuple[Tensor, Call]] = []
        for index, block in enumerate(blocks):
            self._blocks[index] = _Recorder(block, lambda x, call: calls.append((x, call)))
        skipped = {self._model.get_output_embeddings()}
        filled = [
            (name, module)
            for name, module in self._model.named_modules()
            if module not in skipped
            and module._parameters
            and not name.startswith(self.source.adapter.blocks + ".")
        ]
        for name, module in filled:
            fill(module, name, self.source, self.device)
        self._buffers_to(self.device)
        base = self._model.base_model
        hidden = []
        for tokens in batches:
            calls.clear()
            base(tokens.to(self.device), use_cache=False)
            hidden.append(calls[0][0].cpu())
            shape = tuple(tokens.shape)
            if shape not in self._calls:
                self._calls[shape] = [call for _, call in calls]
        for index, block in enumerate(blocks):
            self._blocks[index] = block
        for _, module in filled:
            module.to("meta")
        return hidden

    def _buffers_to(self, device: str) -> None:
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)

    def load(self, index: int) -> "Block":
        """Fill one block; drop the result to free its memory."""
        block = deepcopy(self._blocks[index])
        prefix = f"{self.source.adapter.blocks}.{index}"
        fill(block, prefix, self.source, self.device)
        return Block(block, {shape: calls[index] for shape, calls in self._calls.items()})


class _Stop(Exception):  # noqa: N818
    """Ends a forward pass when what was wanted has been seen."""


class Block:
    """One filled decoder block."""

    def __init__(self, module: nn.Module, calls: dict[tuple[int, ...], Call]) -> None:
        self._module, self._calls = module, calls
        self._device = next(module.parameters()).device

    def copy(self) -> "Block":
        """Return a block with weights of its own."""
        return Block(deepcopy(self._module), self._calls)

    @torch.no_grad()
    def run(self, hidden: Tensor) -> Tensor:
        """Return the block's output: (samples, length, width), on the block's device."""
        call = self._calls[tuple(hidden.shape[:2])]
        hidden = hidden.to(self._device, non_blocking=True)
        output = self._module(hidden, *call.arguments, **call.keywords)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def inputs_of(self, linear: str, hidden: Tensor) -> Tensor:
        """Run the block until `linear` is called and return its input: (tokens, in_features).

        Raises:
            ModelError: the linear was never called.
        """
        seen: list[Tensor] = []

        def stop(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.append(arguments[0])
            raise _Stop

        handle = self._module.get_submodule(linear).register_forward_pre_hook(stop)
        try:
            self.run(hidden)
        except _Stop:
            pass
        finally:
            handle.remove()
        if not seen:
            raise ModelError(f"{linear} was never called: its inputs can't be measured.")
        return seen[0].flatten(0, -2)

    @torch.no_grad()
    def around(self, linear: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Run the whole block; return what goes into `linear` and what its output is added to.

        That sum must be the block's output: `linear` is the last one of the MLP.

        Returns:
            (tokens, in_features), and (tokens, width) float32.

        Raises:
            ModelError: the linear was never called.
        """
        seen: list[tuple[Tensor, Tensor]] = []

        def note(_module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            seen.append((arguments[0], output))

        handle = self._module.get_submodule(linear).register_forward_hook(note)
        try:
            output = self.run(hidden)
        finally:
            handle.remove()
        if not seen:
            raise ModelError(f"{linear} was never called: its inputs can't be measured.")
        inputs, added = seen[0]
        residual = output.flatten(0, -2).float() - added.flatten(0, -2).float()
        return inputs.flatten(0, -2), residual

    def set_weight(self, linear: str, weight: Tensor, *, transposed: bool) -> None:
        """Replace the weight (out_features, in_features) of a linear."""
        parameter = self._module.get_submodule(linear).get_parameter("weight")
        parameter.copy_(weight.T if transposed else weight)
