"""What one decoding step of a Llama-like model reads, as frozen data."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qtool.runtime.tensor_parallel import TensorParallel


class PreparedWeight(Protocol):
    """What a backend has prepared, for its own operations."""

    def dense(self) -> Tensor:
        """Return the weight by the definition of its format, (out_features, in_features)."""


Projection = PreparedWeight | Tensor
"""A weight as a backend wants it, or a dense one, (out_features, in_features)."""
Projections = Projection | tuple[Projection, ...]
"""As one, or one by one: of weights that share an input."""


@dataclass(frozen=True, slots=True)
class RankPart:
    """What one rank has of a weight; `decode.parallel` puts together what ranks make of theirs."""

    weight: Projection
    """Some of the columns: outputs are summed; or, where there are `rows`, some of the rows."""
    group: TensorParallel
    rows: tuple[int, ...] = ()
    """Of each rank."""
    is_even: bool = False
    """All ranks have as many columns, so what is decided by a shape is decided alike."""

    def dense(self) -> Tensor:
        """Return this part by the definition of its format."""
        return self.weight if isinstance(self.weight, Tensor) else self.weight.dense()


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Numbers that the step is specialized for; of this rank's heads, where ranks share a model."""

    num_heads: int
    num_key_value_heads: int
    head_dim: int
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
class DecoderExperts:
    """Experts in the place of an MLP, and what chooses among them."""

    router: Tensor  # (experts, hidden_size)
    per_token: int
    """Experts of a token."""
    sums_to_one: bool
    """Weights of the chosen experts are scaled so that they do."""
    weights_dtype: torch.dtype
    """Of these weights, when they meet what the experts say."""
    gate_up: tuple[Projection, ...]
    """Of each expert, gate and up one below the other."""
    down: tuple[Projection, ...]
    all_gate_up: Projection | None = None
    """Those of all experts one below the other, the same memory; None: they are apart."""
    all_down: Projection | None = None


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One block."""

    input_norm: Tensor  # (hidden_size,)
    qkv: Projections
    """Queries, keys, values one below the other: (heads + 2 key-value heads) * head_dim rows; in
    parts where their schemes differ."""
    qkv_bias: Tensor | None
    query_norm: Tensor | None  # (head_dim,), Qwen3
    key_norm: Tensor | None
    output: Projection
    mlp_norm: Tensor
    gate_up: Projections
    """Both as two, or one below the other in a tensor; or prepared: rows of gate and of up then
    alternate in runs of `core.layout.RUN`. Empty where there are experts."""
    down: Projection | None
    """None where there are experts."""
    experts: DecoderExperts | None = None


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
    group: TensorParallel | None = None
    """The ranks that share the model: `output`, `down` and a head that is no table are parts."""
