"""What a decoding step is made of: the operations, and the buffers they read and write."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from qtool.errors import BackendError
from qtool.runtime.decode.cache import BUFFERS, SCALES
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
from qtool.settings import KvCache


@dataclass(frozen=True, slots=True)
class DecodeState:
    """Where a batch of sequences stands: buffers that a step changes in place.

    All that changes from step to step is here, on the device, so that a step can be a CUDA graph.
    """

    keys: Tensor  # (layers, batch, key-value heads, max_length, head_dim); int8 codes with scales
    values: Tensor  # the same
    rotary: Tensor  # (max_length, head_dim) float32: of each position cosines, then sines
    tokens: Tensor  # (batch,) int64: what the next step reads
    positions: Tensor  # (batch,) int32: of those tokens
    history: Tensor  # (batch, max_length + 1) int64: the chosen token of every position
    steps: Tensor  # (1,) int32: taken ever; never falls, so partial results can be told apart
    scratch: Tensor | None
    """What `DecodeOps.scratch` gave."""
    key_scales: Tensor | None = None  # (layers, batch, key-value heads, max_length) float32
    value_scales: Tensor | None = None  # the same; both None where the cache has no codes

    def cached(self) -> dict[str, Tensor]:
        """Return the buffers of the cache, by name: each begins as `keys` does."""
        buffers = {name: getattr(self, name) for name in BUFFERS}
        return {name: buffer for name, buffer in buffers.items() if buffer is not None}


class Norm(NamedTuple):
    """x / rms(x) * weight, rounded before and after the weight, as transformers does."""

    weight: Tensor  # (features,)
    eps: float


class DecodeOps(Protocol):
    """Runs the operations of a step: (batch, features) in and out, in the dtype of the weights."""

    def compile_ahead(self, run: "Callable[[DecodeOps], object]") -> None:
        """Compile what `run` will need, faster than as it comes; results of `run` are arbitrary.

        `run` is called with operations that compute nothing, or not at all.
        """

    def embed(self, tokens: Tensor, table: Projection) -> Tensor:
        """Return the rows of (batch,) int64 tokens."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return x / rms(x) * weight, rounded before and after the weight, as transformers does."""

    def linear(
        self,
        x: Tensor,
        projection: Projections,
        residual: Tensor | None = None,
        norm: Norm | None = None,
    ) -> Tensor:
        """Return x @ W.T + residual, of x normed; of several projections outputs side by side."""

    def summed(self, x: Tensor, part: RankPart, residual: Tensor | None = None) -> Tensor | None:
        """Return the sum over ranks of x @ W.T, of their columns, + residual, by one launch.

        All ranks call it alike, with the same residual. None, on all of them: it isn't one launch.
        """

    def gated(self, x: Tensor, gate_up: Projections, norm: Norm | None = None) -> Tensor:
        """Return silu(x @ gate.T) * (x @ up.T), of x normed."""

    def experts(self, x: Tensor, experts: DecoderExperts) -> Tensor:
        """Return what the chosen experts of each token say, weighed and summed."""

    def attend(
        self, qkv: Tensor, layer: DecoderLayer, index: int, shape: DecoderShape, state: DecodeState
    ) -> Tensor:
        """Store the keys and values of the new tokens and return (batch, heads * head_dim).

        A position of -1 says that nobody is there: nothing is stored that
        counts, and anything returned.
        """

    def attend_prompts(
        self,
        qkv: Tensor,
        layer: DecoderLayer,
        index: int,
        shape: DecoderShape,
        state: DecodeState,
        prompts: PackedPrompts,
    ) -> Tensor:
        """Store keys and values of tokens of prompts and return (tokens, heads * head_dim).

        May write to `qkv`.
        """

    def choose(self, logits: Tensor, state: DecodeState) -> None:
        """End a step: the likeliest tokens are the next ones, one position further."""

    def draw(self, logits: Tensor, likeliest: Tensor, options: Tensor) -> Tensor | None:
        """Return tokens (rows,) as `core.nucleus` defines them; None: not by an operation of these.

        Args:
            logits: (rows, vocab_size).
            likeliest: (rows,) int64, their maxima.
            options: (rows, 4) float64 on any device: temperature, top_p, a number in [0, 1), and 1
                for the likeliest, else 0.
        """

    def scratch(
        self, shape: DecoderShape, batch: int, max_length: int, device: torch.device
    ) -> Tensor | None:
        """Return zeros for what `attend` shares among blocks, if it needs that."""

    def whole_step(
        self, weights: DecoderWeights, state: DecodeState
    ) -> Callable[[], Tensor] | None:
        """Return one call that is a step over these buffers, `choose` and all; None: there is none.

        It returns logits (batch, vocab_size), in float32 or the dtype of the weights, which the
        next call overwrites.
        """


def new_state(
    weights: DecoderWeights,
    ops: DecodeOps,
    *,
    max_length: int,
    batch: int,
    kv_cache: KvCache = "auto",
) -> DecodeState:
    """Return the buffers of empty sequences.

    Raises:
        BackendError: a sliding window would count within `max_length`.
    """
    if weights.longest is not None and max_length > weights.longest:
        raise BackendError(
            f"The model attends to a window of {weights.longest} positions, so the runner "
            f"can't decode {max_length}. Lower max_length, or let transformers run the model."
        )
    shape, device = weights.shape, weights.final_norm.device
    size = (len(weights.layers), batch, shape.num_key_value_heads, max_length, shape.head_dim)
    dtype = torch.int8 if kv_cache == "int8" else shape.dtype
    keys, values = (_cache(size, dtype, device) for _ in range(2))
    scales = {
        name: _cache(size[:-1], torch.float32, device) for name in SCALES if kv_cache == "int8"
    }
    return DecodeState(
        keys=keys,
        values=values,
        **scales,
        rotary=rotary_table(weights, max_length),
        tokens=torch.zeros(batch, dtype=torch.int64, device=device),
        positions=torch.zeros(batch, dtype=torch.int32, device=device),
        history=torch.zeros(batch, max_length + 1, dtype=torch.int64, device=device),
        steps=torch.zeros(1, dtype=torch.int32, device=device),
        scratch=ops.scratch(shape, batch, max_length, device),
    )


def _cache(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros; on a CPU numpy's, which take memory only where something is written."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    octets = np.zeros(prod(size) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(octets).view(dtype).view(size)


def rotary_table(weights: DecoderWeights, max_length: int) -> Tensor:
    """Return cosines, then sines, of every position: (max_length, head_dim) float32."""
    frequencies = weights.inverse_frequencies.float()
    positions = torch.arange(max_length, device=frequencies.device, dtype=torch.float32)
    angles = positions[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1) * weights.rotary_scale
