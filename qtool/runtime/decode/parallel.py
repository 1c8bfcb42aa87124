"""Tensor-parallel decoding: the operations of a step where each rank has a part of the weights.

Heads and the rows of gate and up lie on one rank each, so between the input of a block and its
output projection nothing is exchanged; what ranks make of the columns of `output` and `down` they
have is summed. All ranks see the same bits after a sum, and so choose the same tokens.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import pad

from qtool.runtime.decode.around import OpsAround
from qtool.runtime.decode.ops import DecodeOps, Norm
from qtool.runtime.decode.weights import (
    DecoderWeights,
    Projections,
    RankPart,
)

Sum = Callable[[Tensor], Tensor]
"""Returns the sum over ranks of (tokens, features), which it may write in its place."""


class ParallelOps(OpsAround):
    """Operations of one rank; what has no parts runs as without others."""

    def __init__(self, ops: DecodeOps, sum_over_ranks: Sum) -> None:
        super().__init__(ops)
        self._sum = sum_over_ranks

    def around(self, ops: DecodeOps) -> DecodeOps:
        """Return the same around operations that compute nothing: nothing is summed meanwhile."""
        return ParallelOps(ops, lambda x: x)

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
        summed = self._ops.summed(x, projection, residual)
        if summed is not None:
            return summed
        return self._sum(self._ops.linear(x, weight, residual if group.leads else None))

    def _side_by_side(self, y: Tensor, part: RankPart) -> Tensor:
        """Return all ranks' rows by a sum with zeros: one of few tokens is faster than a gather."""
        before = sum(part.rows[: part.group.rank])
        return self._sum(pad(y, (before, sum(part.rows) - before - y.shape[-1])))


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
