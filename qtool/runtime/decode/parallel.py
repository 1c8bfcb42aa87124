"""Tensor-parallel decoding: the operations of a step where each rank has a part of the weights.

Heads and the rows of gate and up lie on one rank each, so between the input of a block and its
output projection nothing is exchanged; what ranks make of the columns of `output` and `down` they
have is summed. All ranks see the same bits after a sum, and so choose the same tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

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

Sum = Callable[[Tensor], Tensor]
"""Returns the sum over ranks of (tokens, features), which it may write in its place."""


class ParallelOps:
    """Operations of one rank; what has no parts runs as without others."""

    def __init__(self, ops: DecodeOps, sum_over_ranks: Sum) -> None:
        self._ops, self._sum = ops, sum_over_ranks

    def compile_ahead(self, run: Callable[[DecodeOps], object]) -> None:
        """Compile what this rank's parts need; nothing is summed meanwhile."""
        self._ops.compile_ahead(lambda ops: run(ParallelOps(ops, lambda x: x)))

    def embed(self, tokens: Tensor, table: Projection) -> Tensor:
        """Return the rows of the tokens: every rank has the table."""
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
        """Return x @ W.T + residual, of all ranks' parts, of x normed."""
        if not isinstance(projection, RankPart):
            return self._ops.linear(x, projection, residual, norm)
        group, weight = projection.group, projection.weight
        if projection.rows:
            y = self._side_by_side(self._ops.linear(x, weight, norm=norm), projection)
            return y if residual is None else y + residual
        assert norm is None, "a rank has a part of x"
        return self._sum(self._ops.linear(x, weight, residual if group.leads else None))

    def _side_by_side(self, y: Tensor, part: RankPart) -> Tensor:
        """Return all ranks' rows by a sum with zeros: one of few tokens is faster than a gather."""
        before = sum(part.rows[: part.group.rank])
        return self._sum(pad(y, (before, sum(part.rows) - before - y.shape[-1])))

    def gated(self, x: Tensor, gate_up: Projections, norm: Norm | None = None) -> Tensor:
        """Return silu(x @ gate.T) * (x @ up.T) of this rank's rows, of x normed."""
        return self._ops.gated(x, gate_up, norm)

    def experts(self, x: Tensor, experts: DecoderExperts) -> Tensor:
        """Return what the chosen experts say."""
        return self._ops.experts(x, experts)

    def attend(
        self, qkv: Tensor, layer: DecoderLayer, index: int, shape: DecoderShape, state: DecodeState
    ) -> Tensor:
        """Attend by this rank's heads."""
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
        """Attend within prompts by this rank's heads."""
        return self._ops.attend_prompts(qkv, layer, index, shape, state, prompts)

    def draw(self, logits: Tensor, likeliest: Tensor, options: Tensor) -> Tensor | None:
        """Draw tokens: of logits that are whole on all ranks."""
        return self._ops.draw(logits, likeliest, options)

    def choose(self, logits: Tensor, state: DecodeState) -> None:
        """Take the likeliest tokens: the same on all ranks, whose logits are."""
        self._ops.choose(logits, state)

    def scratch(
        self, shape: DecoderShape, batch: int, max_length: int, device: torch.device
    ) -> Tensor | None:
        """Return what the operations of this rank share among blocks."""
        return self._ops.scratch(shape, batch, max_length, device)

    def whole_step(self, weights: DecoderWeights, state: DecodeState) -> None:
        """Return None: sums come between the operations."""
        del weights, state


def spread_ops(
    ops: DecodeOps, weights: DecoderWeights, sum_over_ranks: Sum | None = None
) -> DecodeOps:
    """Return operations that put parts together, if weights are one rank's; else `ops`.

    Args:
        ops: Run a rank's parts.
        weights: Of the model.
        sum_over_ranks: None: the group's own.
    """
    if weights.group is None:
        return ops
    return ParallelOps(ops, sum_over_ranks or weights.group.all_reduce)
