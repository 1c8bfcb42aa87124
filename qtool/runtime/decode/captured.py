"""A decoding step over fixed buffers: on a card one CUDA graph, elsewhere one call if there is."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qtool.runtime.decode import step
from qtool.runtime.decode.ops import DecodeOps, DecodeState
from qtool.runtime.decode.weights import DecoderWeights


class CapturedStep:
    """Runs `state.tokens` through the model and chooses the next; on a card recorded once."""

    def __init__(self, weights: DecoderWeights, ops: DecodeOps, state: DecodeState) -> None:
        self.state, self._weights, self._ops = state, weights, ops
        self._device = state.keys.device
        self.recorded: tuple[torch.cuda.CUDAGraph, Tensor] | None = None
        self.whole = ops.whole_step(weights, state)

    def run(self) -> Tensor:
        """Take one step; return its logits (batch, vocab_size), which the next one overwrites."""
        if self.whole is not None:
            return self.whole()
        if self._device.type != "cuda":
            return self._eager()
        self.prepare()
        assert self.recorded is not None
        graph, logits = self.recorded
        graph.replay()
        return logits

    def prepare(self) -> None:
        """Record the step, on a card, unless that was done; sequences stay where they are."""
        if self._device.type == "cuda" and self.recorded is None:
            self.recorded = self._capture()

    def _eager(self) -> Tensor:
        logits = step.decode(self._weights, self.state, self._ops)
        self._ops.choose(logits, self.state)
        return logits

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Record the step; sequences stay where they are."""
        tokens, positions = self.state.tokens.clone(), self.state.positions.clone()

        def restored() -> None:
            self._eager()
            self.state.tokens.copy_(tokens)
            self.state.positions.copy_(positions)

        warm_up(restored, self._device)
        return recorded(self._eager, self._device)


def warm_up(run: Callable[[], object], device: torch.device) -> None:
    """Run twice on a side stream, as capture wants: kernels are compiled, their attributes set."""
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(current)
    with torch.cuda.device(device), torch.cuda.stream(side):
        for _ in range(2):
            run()
    current.wait_stream(side)


def recorded(
    run: Callable[[], Tensor],
    device: torch.device,
    pool: Any = None,  # noqa: ANN401
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Return a graph of what was warmed up, and what each replay writes its result to.

    Graphs of one `pool` share their memory: a replay may overwrite the results of the others.
    """
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.device(device),
        torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
    ):
        return graph, run()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the same stream each time: workspaces are kept per stream, and never freed."""
    return torch.cuda.Stream(device)
