"""A whole model in memory that can begin at any block, from what was kept of its input."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from qtool.base import CausalModel
from qtool.walk.filled_block import failures_of_its_code
from qtool.walk.stand_in import StandIn, Stop, as_output


class _Passed(StandIn):
    """Returns what is kept of a block's output, whatever it is given."""

    def __init__(self, block: nn.Module, output: Any) -> None:  # noqa: ANN401
        super().__init__(block)
        self._output = (output,)

    def forward(self, *_arguments: Any, **_keywords: Any) -> Any:  # noqa: ANN401
        return self._output[0]


class PartialRuns:
    """Runs a model from its first block or from a later one, to its logits or through one block.

    What comes beside blocks is the model's own: masks, positions, the last norm, the head. The
    weights may be changed between runs by who owns the model.
    """

    def __init__(self, model: CausalModel, blocks: str) -> None:
        """Take a model in evaluation mode, and the dotted name of its list of blocks."""
        self.model = model
        self.blocks = blocks
        self._blocks = model.get_submodule(blocks)
        self._rest: tuple[Any, ...] | None = None

    def inputs(self, tokens: Tensor) -> Tensor:
        """Return what goes into the first block: (samples, length, width).

        Args:
            tokens: (samples, length) int64.
        """
        seen: list[Tensor] = []

        def note(_block: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:  # noqa: ANN401
            seen.append(arguments[0] if arguments else keywords["hidden_states"])
            self._rest = tuple(output[1:]) if isinstance(output, tuple | list) else None
            raise Stop

        with self._blocks[0].register_forward_hook(note, with_kwargs=True), suppress(Stop):
            self._run(tokens)
        return seen[0]

    def output(self, tokens: Tensor, index: int, hidden: Tensor) -> Tensor:
        """Return what comes out of one block, like its input `hidden`."""
        seen: list[Tensor] = []

        def note(_block: nn.Module, _arguments: Any, output: Any) -> None:  # noqa: ANN401
            seen.append(output[0] if isinstance(output, tuple | list) else output)
            raise Stop

        block = self._blocks[index]
        with self._from(index, hidden), block.register_forward_hook(note), suppress(Stop):
            self._run(tokens)
        return seen[0]

    def inputs_of(self, linear: str, tokens: Tensor, index: int, hidden: Tensor) -> Tensor:
        """Return what goes into a linear, by its dotted name, of the block: (tokens, features)."""
        seen: list[Tensor] = []

        def note(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen.append(arguments[0])
            raise Stop

        module = self.model.get_submodule(linear)
        with self._from(index, hidden), module.register_forward_pre_hook(note), suppress(Stop):
            self._run(tokens)
        return seen[0].flatten(0, -2)

    def logits(self, tokens: Tensor, index: int, hidden: Tensor) -> Tensor:
        """Return what the model says where a block gets `hidden`: (samples, length, vocabulary)."""
        with self._from(index, hidden):
            logits: Tensor = self._run(tokens).logits
        return logits

    @torch.inference_mode()
    def _run(self, tokens: Tensor) -> Any:  # noqa: ANN401
        with failures_of_its_code(type(self.model).__name__):
            return self.model(tokens.to(self.model.device), use_cache=False)

    @contextmanager
    def _from(self, index: int, hidden: Tensor) -> Iterator[None]:
        """Put what is kept in the place of the blocks before one."""
        passed = list(self._blocks)[:index]
        output = as_output(hidden.to(self.model.device), self._rest)
        for place, block in enumerate(passed):
            self._blocks[place] = _Passed(block, output)
        try:
            yield
        finally:
            for place, block in enumerate(passed):
                self._blocks[place] = block
