"""Operations of a decoding step around others'."""

from collections.abc import Callable

import torch
from torch import Tensor

from qtool.runtime.decode.ops import DecodeOps, DecodeState, Norm
from qtool.runtime.decode.prompts import PackedPrompts
from qtool.runtime.decode.weights import (
    DecoderExperts,
    DecoderLayer,
    DecoderShape,
    DecoderWeights,
    Projection,
    Projections,
    RankPart,
)


class OpsAround:
    """`DecodeOps` that hand everything on; a subclass changes what it is there for."""

    def __init__(self, ops: DecodeOps) -> None:
        self._ops = ops

    def around(self, ops: DecodeOps) -> DecodeOps:
        """Return the same around other operations, which may compute nothing."""
        raise NotImplementedError

    def compile_ahead(self, run: Callable[[DecodeOps], object]) -> None:
        """Compile what these operations need, as they call others."""
        self._ops.compile_ahead(lambda ops: run(self.around(ops)))

    def embed(self, tokens: Tensor, table: Projection) -> Tensor:
        """Return the rows of the tokens."""
        return self._ops.embed(tokens, table)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return x / rms(x) * weight."""
        return self._ops.rms_norm(x, weight, eps)

    def linear(
        self,
        x: Tensor,
        projection: Projections,
        residual: Tensor | None = None,
        norm: Norm | None = None,
    ) -> Tensor:
        """Return x @ W.T + residual, of x normed."""
        return self._ops.linear(x, projection, residual, norm)

    def summed(self, x: Tensor, part: RankPart, residual: Tensor | None = None) -> Tensor | None:
        """Return the sum over ranks of x @ W.T + residual, if that is one launch."""
        return self._ops.summed(x, part, residual)

    def gated(self, x: Tensor, gate_up: Projections, norm: Norm | None = None) -> Tensor:
        """Return silu(x @ gate.T) * (x @ up.T) of x normed."""
        return self._ops.gated(x, gate_up, norm)

    def experts(self, x: Tensor, experts: DecoderExperts) -> Tensor:
        """Return what the chosen experts say."""
        return self._ops.experts(x, experts)

    def attend(
        self, qkv: Tensor, layer: DecoderLayer, index: int, shape: DecoderShape, state: DecodeState
    ) -> Tensor:
        """Attend to the cache."""
        return self._ops.attend(qkv, layer, index, shape, state)

    def attend_prompts(
        self,
        qkv: Tensor,
        layer: DecoderLayer,
        index: int,
        shape: DecoderShape,
        state: DecodeState,
        prompts: PackedPrompts,
    ) -> Tensor:
        """Attend within prompts."""
        return self._ops.attend_prompts(qkv, layer, index, shape, state, prompts)

    def draw(self, logits: Tensor, likeliest: Tensor, options: Tensor) -> Tensor | None:
        """Draw tokens."""
        return self._ops.draw(logits, likeliest, options)

    def choose(self, logits: Tensor, state: DecodeState) -> None:
        """Take the likeliest tokens."""
        self._ops.choose(logits, state)

    def scratch(
        self, shape: DecoderShape, batch: int, max_length: int, device: torch.device
    ) -> Tensor | None:
        """Return what operations share among blocks."""
        return self._ops.scratch(shape, batch, max_length, device)

    def whole_step(
        self, weights: DecoderWeights, state: DecodeState
    ) -> Callable[[], Tensor] | None:
        """Return None: a step that is one call has no room for what comes between."""
        del weights, state
        return None
