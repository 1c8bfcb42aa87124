"""A decoding step over fixed buffers: on a card one CUDA graph, elsewhere one call if there is."""

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
        """Record the step; compiles kernels and sets their attributes first, on a side stream."""
        with torch.cuda.device(self._device):
            step.warm_up(self._eager, self.state, self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                return graph, self._eager()
