"""The weights of one layer of vLLM, by the backend that runs them. No vLLM here.

Queries, keys and values that agree in format, scheme and inputs become one weight, so that a layer
is one product; others are multiplied one after the other.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from qtool.base import KernelBackend, QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.core.activations import multiply_quantized
from qtool.errors import SchemeError
from qtool.formats._in_planes import opened_weight
from qtool.integrations.vllm.incoming import RankWeight, torchs_own_defaults
from qtool.integrations.vllm.slices import PLAIN_PART
from qtool.runtime.backends._choose import choose_backend, reasons_against, wanted_backend
from qtool.runtime.held import finish_packing
from qtool.runtime.spread import AnyWeight
from qtool.scheme import ActivationScheme

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LayerProduct:
    """One weight in the layout of its backend."""

    backend: KernelBackend | None
    """None: it isn't quantized."""
    prepared: Any
    """What the backend made; a plain weight."""
    activation: ActivationScheme | None
    dtype: torch.dtype
    """Of the activations."""

    def multiply(self, x: Tensor) -> Tensor:
        """Return x @ W.T, of `x` quantized if the checkpoint says so, in the dtype of `x`.

        Compilers that see it needn't know how many tokens there are.
        """
        if self.activation is None:
            return self._multiply(x)
        return multiply_quantized(x, self.activation, self._multiply)

    def _multiply(self, x: Tensor) -> Tensor:
        if self.backend is None:
            return torch.nn.functional.linear(x, self.prepared)
        return self.backend.matmul(x, self.prepared)

    def rows(self, index: Tensor) -> Tensor:
        """Return the rows of W that `index` names, (*index.shape, in_features)."""
        if self.backend is None:
            return torch.nn.functional.embedding(index, self.prepared)
        return self.backend.rows(index, self.prepared).to(self.dtype)


@functools.cache
def _warn_once(reasons: str) -> None:
    _LOG.warning("qtool's weights are as large here as if they weren't quantized. %s", reasons)


def _warn_of_dense(weight: QuantizedTensor, device: torch.device) -> None:
    against = reasons_against(weight, device)
    _warn_once("; ".join(f"{name}: {reason}" for name, reason in against.items()))


def multiply_all(products: Sequence[LayerProduct], x: Tensor) -> Tensor:
    """Return x @ W.T for weights that lie one below the other."""
    parts = [product.multiply(x) for product in products]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


@torchs_own_defaults()
def prepare_products(pieces: Sequence[RankWeight], dtype: torch.dtype) -> tuple[LayerProduct, ...]:
    """Let a backend prepare the weights of a layer, as few as possible, for activations of `dtype`.

    Raises:
        BackendError: the backend that is asked for can't run them.
    """
    return tuple(_prepared(piece, dtype) for piece in merged(pieces))


def merged(pieces: Sequence[RankWeight]) -> list[RankWeight]:
    """Make one of neighbours that agree in all but their rows, to the bit."""
    found: list[RankWeight] = []
    for _, group in groupby(pieces, _kind):
        alike = list(group)
        joined = _joined([piece.weight for piece in alike])
        found += alike if joined is None else [RankWeight(joined, alike[0].activation)]
    return found


def _kind(piece: RankWeight) -> object:
    weight = piece.weight
    if isinstance(weight, Tensor):
        return (PLAIN_PART, weight.dtype, weight.shape[1], piece.activation)
    return (weight.format, weight.scheme, weight.shape.in_features, piece.activation)


def _joined(weights: Sequence[AnyWeight]) -> AnyWeight | None:
    """Return weights as one; None where groups would run on from one to the next."""
    plain = [weight for weight in weights if isinstance(weight, Tensor)]
    if plain:
        return torch.cat(plain)
    tensors = [weight for weight in weights if isinstance(weight, QuantizedTensor)]
    try:
        return codec(tensors[0].format).cat(tensors, 0)
    except SchemeError:
        return None


def _prepared(piece: RankWeight, dtype: torch.dtype) -> LayerProduct:
    weight = piece.weight
    if isinstance(weight, Tensor):
        return LayerProduct(None, weight.to(dtype), piece.activation, dtype)
    device = next(iter(weight.parts.values())).device
    weight = opened_weight(weight)
    backend = choose_backend(weight, device, wanted_backend())
    prepared = backend.prepare(weight, dtype)
    if isinstance(prepared, Tensor) and device.type != "cpu":
        _warn_of_dense(weight, device)
    finish_packing(device)
    return LayerProduct(backend, prepared, piece.activation, dtype)
