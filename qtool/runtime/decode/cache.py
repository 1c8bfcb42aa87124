"""What the cache holds: keys and values as they are, or int8 codes and scales per head and token.

A scale is the largest magnitude of a head's key, or value, over 127; a code the nearest integer to
the number over the scale. Rows of both are written once and never changed: no later token alters
what an earlier one has left, so neither batching nor moving a sequence changes a bit.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from qtool import settings
from qtool.errors import BackendError
from qtool.runtime.decode.weights import DecoderWeights
from qtool.settings import KvCache

if TYPE_CHECKING:
    from qtool.runtime.decode.ops import DecodeState

LARGEST_CODE = 127
SCALES = ("key_scales", "value_scales")
BUFFERS = ("keys", "values", *SCALES)
"""Of a `DecodeState`, all (layers, batch, key-value heads, max_length, ...)."""
_WANTED: ContextVar[KvCache | None] = ContextVar("qtool_kv_cache", default=None)


@contextlib.contextmanager
def use_kv_cache(kind: KvCache | None) -> Iterator[None]:
    """Say inside the block how keys and values are kept; None: by $QTOOL_KV_CACHE, else "auto".

    Raises:
        BackendError: there is no such cache.
    """
    token = _WANTED.set(None if kind is None else _checked(kind))
    try:
        yield
    finally:
        _WANTED.reset(token)


def wanted_kv_cache() -> KvCache:
    """Return how keys and values are to be kept here.

    Raises:
        BackendError: $QTOOL_KV_CACHE names no cache.
    """
    return _WANTED.get() or _checked(settings.kv_cache() or "auto")


def _checked(kind: str) -> KvCache:
    for known in get_args(KvCache):
        if kind == known:
            return known
    raise BackendError(
        f"There is no key-value cache {kind!r}. Take {' or '.join(get_args(KvCache))}."
    )


def bytes_per_token(weights: DecoderWeights, kind: KvCache) -> int:
    """Return what keys and values of one token take in all layers."""
    shape = weights.shape
    row = shape.head_dim * shape.dtype.itemsize
    if kind == "int8":
        row = shape.head_dim + torch.float32.itemsize
    return 2 * len(weights.layers) * shape.num_key_value_heads * row


def quantized_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes int8 (..., head_dim) and scales float32 (...) of x (..., head_dim)."""
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    most = torch.full_like(largest, LARGEST_CODE)  # by a number torch divides with two roundings
    codes = (wide * torch.where(largest == 0, 0.0, most / largest)).round()
    return codes.to(torch.int8), (largest / most).squeeze(-1)


def dequantized_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return codes times scales, (..., head_dim), rounded once."""
    return (codes.float() * scales.unsqueeze(-1)).to(dtype)


def write_cache(
    state: "DecodeState", layer: int, slots: Tensor, places: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Store keys and values (tokens, heads, head_dim) of tokens, which may be of any sequences.

    Args:
        state: Whose cache.
        layer: Of the cache.
        slots: (tokens,) int64: the sequence of each.
        places: (tokens,) int64: its position, no two the same of one sequence.
        key: In the dtype of activations.
        value: The same.

    Returns:
        Both as the cache holds them, in the dtype that they came in.
    """
    where = slots, places
    return (
        _write(state.keys[layer], _of(state.key_scales, layer), where, key),
        _write(state.values[layer], _of(state.value_scales, layer), where, value),
    )


def read_cache(state: "DecodeState", layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return all keys and values of a layer, (batch, heads, max_length, head_dim) of `dtype`."""
    if state.key_scales is None or state.value_scales is None:
        return state.keys[layer], state.values[layer]
    return (
        dequantized_rows(state.keys[layer], state.key_scales[layer], dtype),
        dequantized_rows(state.values[layer], state.value_scales[layer], dtype),
    )


def _of(scales: Tensor | None, layer: int) -> Tensor | None:
    return None if scales is None else scales[layer]


def _write(rows: Tensor, scales: Tensor | None, where: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    slots, places = where
    if scales is None:
        rows[slots, :, places] = x
        return x
    codes, each = quantized_rows(x)
    rows[slots, :, places], scales[slots, :, places] = codes, each
    return dequantized_rows(codes, each, x.dtype)
