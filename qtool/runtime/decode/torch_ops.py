"""The operations of a decoding step in plain torch: their definition, and what a CPU runs."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from qtool.core.experts import chosen
from qtool.core.layout import side_by_side
from qtool.runtime.decode.cache import read_cache, write_cache
from qtool.runtime.decode.ops import DecodeOps, DecodeState, Norm
from qtool.runtime.decode.prompts import PackedPrompts, attend_to_cache, cache_of_prompts
from qtool.runtime.decode.weights import (
    DecoderExperts,
    DecoderLayer,
    DecoderShape,
    DecoderWeights,
    Projection,
    Projections,
    RankPart,
)


class TorchOps:
    """Rounds where transformers does; reads no number back, so it can be captured as well."""

    def compile_ahead(self, run: Callable[[DecodeOps], object]) -> None:
        """Do nothing: torch has what it needs."""

    def embed(self, tokens: Tensor, table: Projection) -> Tensor:
        """Return the rows of the tokens."""
        return functional.embedding(tokens, dense(table))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return x / rms(x) * weight."""
        return rms_norm(x, weight, eps)

    def linear(
        self,
        x: Tensor,
        projection: Projections,
        residual: Tensor | None = None,
        norm: Norm | None = None,
    ) -> Tensor:
        """Return x @ W.T + residual, of x normed."""
        x = x if norm is None else self.rms_norm(x, *norm)
        parts = projection if isinstance(projection, tuple) else (projection,)
        several = [self._multiplied(x, part) for part in parts]
        y = several[0] if len(several) == 1 else torch.cat(several, dim=-1)
        return y if residual is None else residual + y

    def _multiplied(self, x: Tensor, projection: Projection) -> Tensor:
        return functional.linear(x, dense(projection))

    def summed(self, x: Tensor, part: RankPart, residual: Tensor | None = None) -> Tensor | None:
        """Return None: a product and a sum are two things."""
        del x, part, residual
        return None

    def gated(self, x: Tensor, gate_up: Projections, norm: Norm | None = None) -> Tensor:
        """Return silu(x @ gate.T) * (x @ up.T), of x normed."""
        y = self.linear(x, gate_up, norm=norm)
        return silu_times(y if isinstance(gate_up, tuple | Tensor) else side_by_side(y))

    def experts(self, x: Tensor, experts: DecoderExperts) -> Tensor:
        """Return the weighed sum; by gathered weights where tokens are few."""
        index, weights = routed(x, experts)
        few = index.numel() <= len(experts.gate_up) or is_captured(x)
        if few and isinstance(experts.all_gate_up, Tensor) and isinstance(experts.all_down, Tensor):
            said = _by_gathering(x, index, experts.all_gate_up, experts.all_down)
        else:
            said = one_by_one(self, x, index, experts)
        return weighed(said, weights, x.dtype)

    def attend(
        self, qkv: Tensor, layer: DecoderLayer, index: int, shape: DecoderShape, state: DecodeState
    ) -> Tensor:
        """Attend over the whole cache; what lies beyond the positions weighs nothing.

        Where nobody is the last position is written to: no prompt is so long, and a step writes
        there before it looks.
        """
        positions = state.positions.long()
        query, key, value = heads_of(qkv, layer, shape, state.rotary[positions])
        slots = torch.arange(len(positions), device=qkv.device)
        write_cache(state, index, slots, positions, key, value)
        keys, values = read_cache(state, index, qkv.dtype)
        seen = torch.arange(keys.shape[2], device=qkv.device) <= positions[:, None]
        attended = functional.scaled_dot_product_attention(
            query[:, :, None],
            *(keys, values, seen[:, None, None]),
            scale=shape.attention_scale,
            enable_gqa=shape.group > 1,
        )
        return attended.flatten(1)

    def attend_prompts(
        self,
        qkv: Tensor,
        layer: DecoderLayer,
        index: int,
        shape: DecoderShape,
        state: DecodeState,
        prompts: PackedPrompts,
    ) -> Tensor:
        """Store keys and values, and attend."""
        positions = prompts.positions.long()
        query, key, value = heads_of(qkv, layer, shape, state.rotary[positions])
        write_cache(state, index, prompts.slots.long(), positions, key, value)
        cache = cache_of_prompts(state, index, prompts, qkv.dtype)
        return attend_to_cache(query, *cache, shape.attention_scale)

    def choose(self, logits: Tensor, state: DecodeState) -> None:
        """Take the likeliest tokens and move on."""
        state.tokens.copy_(logits.argmax(-1))
        state.positions.add_(1)
        state.history.scatter_(1, state.positions.long()[:, None], state.tokens[:, None])
        state.steps.add_(1)

    def draw(self, logits: Tensor, likeliest: Tensor, options: Tensor) -> Tensor | None:
        """Return None: `core.nucleus` is in torch as well."""
        del logits, likeliest, options
        return None

    def scratch(
        self, shape: DecoderShape, batch: int, max_length: int, device: torch.device
    ) -> Tensor | None:
        """Return None: nothing is shared."""
        del shape, batch, max_length, device
        return None

    def whole_step(
        self, weights: DecoderWeights, state: DecodeState
    ) -> Callable[[], Tensor] | None:
        """Return None: a step is the operations one by one."""
        del weights, state
        return None


def routed(x: Tensor, experts: DecoderExperts) -> tuple[Tensor, Tensor]:
    """Return the experts of tokens and their weights: (tokens, k) int64, and floats."""
    logits = functional.linear(x, experts.router)
    weights, index = torch.softmax(logits, dim=-1, dtype=torch.float32).topk(experts.per_token)
    if experts.sums_to_one:
        weights = weights / weights.sum(-1, keepdim=True)
    return index, weights.to(experts.weights_dtype)


def one_by_one(ops: DecodeOps, x: Tensor, index: Tensor, experts: DecoderExperts) -> Tensor:
    """Return what each token's experts say, (tokens, k, hidden), by one expert after the other.

    Reads on the host who is chosen, so no graph can hold it.
    """
    said = x.new_empty(index.numel(), x.shape[-1])
    for number, slots in chosen(index, len(experts.gate_up)):
        y = silu_times(ops.linear(x[slots // index.shape[-1]], experts.gate_up[number]))
        said[slots] = ops.linear(y, experts.down[number])
    return said.view(*index.shape, -1)


def _by_gathering(x: Tensor, index: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Do the same by the weights of the chosen experts, copied for each token: few are meant."""
    slots, hidden = index.flatten(), x.shape[-1]
    inputs = x.repeat_interleave(index.shape[-1], 0).unsqueeze(-1)
    width = down.shape[-1]
    y = torch.bmm(gate_up.view(-1, 2 * width, hidden)[slots], inputs).squeeze(-1)
    y = torch.bmm(down.view(-1, hidden, width)[slots], silu_times(y).unsqueeze(-1))
    return y.view(*index.shape, hidden)


def is_captured(x: Tensor) -> bool:
    """Return whether what runs goes into a graph, so that the host may read nothing."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def weighed(said: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weighed sum over (tokens, k, hidden): (tokens, hidden)."""
    return (said * weights.unsqueeze(-1)).sum(1).to(dtype)


def dense(projection: Projection) -> Tensor:
    """Return a projection's weight, by the definition of its format."""
    return projection if isinstance(projection, Tensor) else projection.dense()


def silu_times(y: Tensor) -> Tensor:
    """Return silu(gate) * up of (..., 2 * intermediate_size), side by side."""
    gate, up = y.chunk(2, dim=-1)
    return functional.silu(gate) * up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * weight, rounded before the weight and after it."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def heads_of(
    qkv: Tensor, layer: DecoderLayer, shape: DecoderShape, rotary: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries, rotated keys, and values.

    Args:
        qkv: (..., (heads + 2 key-value heads) * head_dim), without bias.
        layer: Whose bias and norms count.
        shape: Of the model.
        rotary: (..., head_dim) float32, of each token's position.

    Returns:
        (..., heads, head_dim), and twice (..., key-value heads, head_dim).
    """
    biased = qkv if layer.qkv_bias is None else qkv + layer.qkv_bias
    counts = [shape.num_heads, shape.num_key_value_heads, shape.num_key_value_heads]
    query, key, value = biased.unflatten(-1, (-1, shape.head_dim)).split(counts, dim=-2)
    if layer.query_norm is not None:
        query = rms_norm(query, layer.query_norm, shape.norm_eps)
    if layer.key_norm is not None:
        key = rms_norm(key, layer.key_norm, shape.norm_eps)
    return rotated(query, rotary), rotated(key, rotary), value


def rotated(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2) of x (..., heads, head_dim)."""
    cosines, sines = (torch.cat([part, part], -1).unsqueeze(-2) for part in rotary.chunk(2, -1))
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cosines.to(x.dtype) + turned * sines.to(x.dtype)


OPS: DecodeOps = TorchOps()
