"""Low-rank parts of an adapter in a decoding step: beside any weight, over any operations."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qtool.checkpoint.adapter import RANK_DOWN, RANK_UP
from qtool.core.layout import side_by_side
from qtool.runtime.decode.around import OpsAround
from qtool.runtime.decode.ops import DecodeOps, Norm
from qtool.runtime.decode.torch_ops import dense, silu_times
from qtool.runtime.decode.weights import (
    DecoderWeights,
    Projections,
)


@dataclass(frozen=True, slots=True)
class LowRankBeside:
    """Weights that share an input, as one or apart, and what is added to their outputs."""

    weights: Projections
    down: Tensor  # (rank, in_features), of all one below the other
    up: Tensor
    """(out_features, rank), of each at its own outputs and ranks."""

    def dense(self) -> Tensor:
        """Return all of it as one weight, one below the other."""
        parts = self.weights if isinstance(self.weights, tuple) else (self.weights,)
        return torch.cat([dense(part) for part in parts]) + self.up @ self.down


def low_rank_beside(
    weights: Projections, members: Sequence[Any], dtype: torch.dtype
) -> LowRankBeside | None:
    """Return weights with the low-rank parts of adapters on their modules; None: there are none."""
    found = [getattr(member, "adapter", {}) for member in members]
    if not any(RANK_UP in one for one in found):
        return None
    downs, ups = [], []
    for member, one in zip(members, found, strict=True):
        outputs, inputs = member.out_features, member.in_features
        empty = {RANK_DOWN: torch.empty(0, inputs), RANK_UP: torch.empty(outputs, 0)}
        part = one if RANK_UP in one else empty
        downs.append(part[RANK_DOWN])
        ups.append(part[RANK_UP])
    device = next(one[RANK_UP].device for one in found if RANK_UP in one)
    down = torch.cat([part.to(device, dtype) for part in downs])
    up = torch.block_diag(*(part.to(device, dtype) for part in ups))
    return LowRankBeside(weights, down, up.contiguous())


def has_low_rank(weights: DecoderWeights) -> bool:
    """Return whether anything in a model is of low rank."""
    of_layers = ((one.qkv, one.output, one.gate_up, one.down) for one in weights.layers)
    found = (part for layer in of_layers for part in layer)
    return any(isinstance(part, LowRankBeside) for part in (weights.head, *found))


def without_low_rank(weights: DecoderWeights) -> DecoderWeights:
    """Return what backends know: the same weights, nothing beside them."""
    layers = (
        replace(
            layer,
            qkv=_plain(layer.qkv),
            output=_plain(layer.output),
            gate_up=_plain(layer.gate_up),
            down=None if layer.down is None else _plain(layer.down),
        )
        for layer in weights.layers
    )
    return replace(weights, layers=tuple(layers), head=_plain(weights.head))


def _plain(weights: Any) -> Any:  # noqa: ANN401
    return weights.weights if isinstance(weights, LowRankBeside) else weights


class LowRankOps(OpsAround):
    """Operations that add low-rank parts to what others multiply; all else is theirs."""

    def around(self, ops: DecodeOps) -> DecodeOps:
        """Return the same around other operations."""
        return LowRankOps(ops)

    def linear(
        self,
        x: Tensor,
        projection: Projections,
        residual: Tensor | None = None,
        norm: Norm | None = None,
    ) -> Tensor:
        """Return x @ W.T + residual, of x normed."""
        if not isinstance(projection, LowRankBeside):
            return self._ops.linear(x, projection, residual, norm)
        x = x if norm is None else self._ops.rms_norm(x, *norm)
        return self._ops.linear(x, projection.weights, residual) + _added(x, projection)

    def gated(self, x: Tensor, gate_up: Projections, norm: Norm | None = None) -> Tensor:
        """Return silu(x @ gate.T) * (x @ up.T), of x normed."""
        if not isinstance(gate_up, LowRankBeside):
            return self._ops.gated(x, gate_up, norm)
        x = x if norm is None else self._ops.rms_norm(x, *norm)
        y = self._ops.linear(x, gate_up.weights)
        y = y if isinstance(gate_up.weights, tuple | Tensor) else side_by_side(y)
        return silu_times(y + _added(x, gate_up))


def _added(x: Tensor, projection: LowRankBeside) -> Tensor:
    return (x @ projection.down.T) @ projection.up.T
