"""The decoder blocks of a model, one at a time: weights come from disk, inputs from the cache.

The model object is built with parameters that take no memory. Only what feeds the first block is
filled in to capture its inputs; after that one block at a time is filled, run and emptied.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from qtool.core.experts import separate_experts
from qtool.core.parts import Parts
from qtool.errors import ModelError
from qtool.formats._dtypes import dtype_of
from qtool.modeling.config import auto_class, transformers_failures
from qtool.modeling.filling import empty_own, fill, fill_own, weightless
from qtool.modeling.source import ModelSource
from qtool.walk.calls import Call, Calls, Note, Recorder, mapped
from qtool.walk.filled_block import Block, failures_of_its_code


def walk_dtype(source: ModelSource, device: str, dtype: str) -> torch.dtype:
    """Return in which dtype blocks run, as `BlockModel` is told."""
    if dtype != "auto":
        return dtype_of(dtype)
    if not device.startswith("cuda"):
        return torch.float32
    first = next(source.block_linears())
    stored = source.spec(f"{first}.weight").dtype
    return torch.bfloat16 if stored == "BF16" else torch.float16


class BlockModel:
    """The empty model and what its blocks are called with."""

    def __init__(
        self, source: ModelSource, device: str, *, dtype: str = "auto", parts: Parts | None = None
    ) -> None:
        """Build the model without weights.

        Args:
            source: Where the weights are.
            device: Where blocks run.
            dtype: In which they run. `auto`: in float32 on a CPU; on a card in bfloat16 if the
                weights are stored so, because such a model's activations may leave the range of
                float16, else in float16.
            parts: That batches are run in where memory is full; None: they are whole.

        Raises:
            ModelError: transformers can't build it.
        """
        self.source, self.device = source, device
        run_dtype = walk_dtype(source, device, dtype)
        with transformers_failures(f"transformers can't build {source.directory}"), weightless():
            model = auto_class(source.parsed).from_config(deepcopy(source.parsed), dtype=run_dtype)
            separate_experts(model)
        self._model = model.eval()
        self._blocks = model.get_submodule(source.adapter.blocks)
        self._calls = Calls()
        self._parts = parts

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
                self._check_alone(call, rest[0])
                return rest[0]

            hidden = []
            with self._recorded(note):
                for tokens in batches:
                    calls.clear()
                    with failures_of_its_code(str(self.source.directory)):
                        self._model.base_model(tokens.to(self.device), use_cache=False)
                    if not calls:
                        raise ModelError(
                            f"{self.source.adapter.blocks} of {self.source.directory} is never "
                            "called. Quantize it without calibration data."
                        )
                    hidden.append(calls[0][0].cpu())
                    self._calls.add([call for _, call in calls])
        return hidden

    def _check_alone(self, call: Call, rest: tuple[Any, ...] | None) -> None:
        """Raise ModelError if a block is given what the one before returned beside its output.

        What stands in for blocks returns the same of these for all batches.
        """
        returned, given = set[int](), set[int]()
        mapped(rest, lambda _place, tensor: returned.add(id(tensor)))
        mapped(call, lambda _place, tensor: given.add(id(tensor)))
        if returned & given:
            raise ModelError(
                f"The blocks of {self.source.directory} hand on more than hidden states, and "
                "can't be run one by one. Quantize it without calibration data."
            )

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

    def load(self, index: int) -> Block:
        """Fill one block; drop the result to free its memory."""
        block = deepcopy(self._blocks[index])
        prefix = f"{self.source.adapter.blocks}.{index}"
        fill(block, prefix, self.source, self.device)
        return Block(block, prefix, self._calls.of(index), self._parts)
