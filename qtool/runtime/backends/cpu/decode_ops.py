"""Decoding on the CPU: a step is one native call, a prompt is read through torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtool.core.native.library import NATIVE_DTYPES
from qtool.runtime.backends.cpu.decode_step import DecoderTable, NativeStep
from qtool.runtime.decode.ops import DecodeState, Norm
from qtool.runtime.decode.torch_ops import TorchOps, silu_times
from qtool.runtime.decode.weights import DecoderWeights, Projection, Projections


@dataclass(frozen=True, slots=True)
class NativeCalls:
    """What the backend has for weights that it has prepared, and its library."""

    library: Any
    """With `qt_decode_step` and `qt_decode_room`."""
    packed: Callable[[Any], int]
    """Returns the address of what the library has of a weight."""
    multiply: Callable[[Tensor, Any], Tensor]
    """(..., in_features), weight -> (..., out_features)."""
    rows: Callable[[Tensor, Any], Tensor]
    """(...) int64, weight -> (..., in_features)."""
    threads: Callable[[], int]
    """Returns by how many threads a step runs."""


class NativeOps(TorchOps):
    """Of one model; what isn't prepared by the backend is dense."""

    def __init__(self, weights: DecoderWeights, calls: NativeCalls) -> None:
        self._calls = calls
        dense = all(layer.experts is None for layer in weights.layers)
        alone = weights.group is None
        self._table = DecoderTable(weights, calls.packed) if dense and alone else None

    def embed(self, tokens: Tensor, table: Projection) -> Tensor:
        """Return the rows of the tokens."""
        if isinstance(table, Tensor):
            return super().embed(tokens, table)
        return self._calls.rows(tokens, table)

    def gated(self, x: Tensor, gate_up: Projections, norm: Norm | None = None) -> Tensor:
        """Return silu(x @ gate.T) * (x @ up.T), of x normed."""
        if not isinstance(gate_up, tuple) or len(gate_up) != 2:  # noqa: PLR2004 - gate and up
            return silu_times(self.linear(x, gate_up, norm=norm))
        x = x if norm is None else self.rms_norm(x, *norm)
        gate, up = (self._multiplied(x, part).contiguous() for part in gate_up)
        pointers, shape = (gate.data_ptr(), up.data_ptr()), gate.view(-1, gate.shape[-1]).shape
        dtype = NATIVE_DTYPES.index(gate.dtype)
        threads = self._calls.threads()
        self._calls.library.qt_gate_rows(*pointers, *shape, dtype, gate.data_ptr(), threads)
        return gate

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return x / rms(x) * weight, rounded before the weight and after it."""
        if weight.dtype != x.dtype or x.dtype not in NATIVE_DTYPES:
            return super().rms_norm(x, weight, eps)
        x, weight = x.contiguous(), weight.contiguous()
        y, shape = torch.empty_like(x), x.view(-1, x.shape[-1]).shape
        pointers, dtype = (x.data_ptr(), weight.data_ptr()), NATIVE_DTYPES.index(x.dtype)
        threads = self._calls.threads()
        self._calls.library.qt_norm_rows(*pointers, eps, *shape, dtype, y.data_ptr(), threads)
        return y

    def whole_step(self, weights: DecoderWeights, state: DecodeState) -> NativeStep | None:
        """Return the native step; None where there are experts, codes in the cache, ranks."""
        del weights
        if self._table is None or state.key_scales is not None:
            return None
        return NativeStep(self._table, state, self._calls.library, self._calls.threads)

    def _multiplied(self, x: Tensor, projection: Projection) -> Tensor:
        if isinstance(projection, Tensor):
            return torch.nn.functional.linear(x, projection)
        return self._calls.multiply(x, projection)
