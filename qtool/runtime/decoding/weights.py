"""What one decoding step of a Llama-like model reads, as frozen data."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.runtime.linear_kernels import KernelWeight

Projection = KernelWeight | Tensor
"""A packed weight for the kernels, or a dense one, (out_features, in_features) 16 bit."""


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Numbers that the step is specialized for."""

    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    attention_scale: float
    dtype: torch.dtype
    """Of activations and cache: float16 or bfloat16; float32 without kernels."""

    @property
    def group(self) -> int:
        """Return how many query heads share a key-value head."""
        return self.num_heads // self.num_key_value_heads


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One block."""

    input_norm: Tensor  # (hidden_size,)
    qkv: Projection | tuple[Projection, ...]
    """Queries, keys, values one below the other: (heads + 2 key-value heads) * head_dim rows; in
    parts where their schemes differ."""
    qkv_bias: Tensor | None
    query_norm: Tensor | None  # (head_dim,), Qwen3
    key_norm: Tensor | None
    output: Projection
    mlp_norm: Tensor
    gate_up: Projection | tuple[Projection, Projection]
    """Rows of gate and up alternate in runs of eight: see `linear_kernels.interleave`; or both,
    where their schemes differ."""
    down: Projection


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A whole model."""

    shape: DecoderShape
    embedding: Projection
    layers: tuple[DecoderLayer, ...]
    final_norm: Tensor
    head: Projection
    inverse_frequencies: Tensor
    """(head_dim / 2,) float32, of rotary positions, scaling applied."""
    rotary_scale: float = 1.0
    """Factor on cosines and sines."""
    longest: int | None = None
    """Positions that a sequence may have, if a sliding window would begin to count beyond."""
