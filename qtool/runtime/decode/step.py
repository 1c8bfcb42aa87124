"""A decoding step and a prefill: functions of weights, buffers and operations."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from qtool.runtime.decode.cache import write_cache
from qtool.runtime.decode.ops import DecodeOps, DecodeState
from qtool.runtime.decode.torch_ops import heads_of
from qtool.runtime.decode.weights import DecoderLayer, DecoderWeights


def decode(weights: DecoderWeights, state: DecodeState, ops: DecodeOps) -> Tensor:
    """Read `state.tokens` and return the logits after them, (batch, vocab_size)."""

    def attend(qkv: Tensor, layer: DecoderLayer, index: int) -> Tensor:
        return ops.attend(qkv, layer, index, weights.shape, state)

    return _logits(_hidden(weights, state.tokens, ops, attend), weights, ops)


def prefill(weights: DecoderWeights, ids: Tensor, state: DecodeState, ops: DecodeOps) -> Tensor:
    """Read whole prompts into an empty cache; return the logits after them.

    Args:
        weights: Of the model.
        ids: (batch, length) int64; what follows a shorter prompt is read too, and seen by nothing:
            attention is causal, and each step writes over it before it looks there.
        state: Its keys and values are written; its positions are the lengths of the prompts.
        ops: What runs.
    """
    shape, (batch, length) = weights.shape, ids.shape
    slots, places = torch.cartesian_prod(
        *(torch.arange(count, device=ids.device) for count in (batch, length))
    ).unbind(1)

    def attend(qkv: Tensor, layer: DecoderLayer, index: int) -> Tensor:
        query, key, value = heads_of(qkv, layer, shape, state.rotary[places])
        held = write_cache(state, index, slots, places, key, value)
        query, key, value = (
            part.unflatten(0, (batch, length)).transpose(1, 2) for part in (query, *held)
        )
        attended = functional.scaled_dot_product_attention(
            *(query, key, value),
            is_causal=length > 1,
            scale=shape.attention_scale,
            enable_gqa=shape.group > 1,
        )
        return attended.transpose(1, 2).reshape(batch * length, -1)

    x = _hidden(weights, ids.flatten(), ops, attend)
    sequences = torch.arange(batch, device=x.device)
    last = x.view(batch, length, -1)[sequences, state.positions.long() - 1]
    return _logits(last, weights, ops)


def _hidden(
    weights: DecoderWeights,
    tokens: Tensor,
    ops: DecodeOps,
    attend: Callable[[Tensor, DecoderLayer, int], Tensor],
) -> Tensor:
    """Return what the blocks make of tokens (n,): (n, hidden_size)."""
    x, eps = ops.embed(tokens, weights.embedding), weights.shape.norm_eps
    for index, layer in enumerate(weights.layers):
        qkv = ops.linear(ops.rms_norm(x, layer.input_norm, eps), layer.qkv)
        x = ops.linear(attend(qkv, layer, index), layer.output, x)
        normed = ops.rms_norm(x, layer.mlp_norm, eps)
        if layer.experts is not None:
            x = x + ops.experts(normed, layer.experts)
        elif layer.down is not None:
            x = ops.linear(ops.gated(normed, layer.gate_up), layer.down, x)
    return x


def _logits(x: Tensor, weights: DecoderWeights, ops: DecodeOps) -> Tensor:
    return ops.linear(ops.rms_norm(x, weights.final_norm, weights.shape.norm_eps), weights.head)
