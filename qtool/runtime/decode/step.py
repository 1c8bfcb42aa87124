"""A decoding step and a prefill: functions of weights, buffers and operations."""

from collections.abc import Callable

from torch import Tensor

from qtool.runtime.decode.ops import DecodeOps, DecodeState
from qtool.runtime.decode.prompts import PackedPrompts
from qtool.runtime.decode.weights import DecoderLayer, DecoderWeights


def decode(weights: DecoderWeights, state: DecodeState, ops: DecodeOps) -> Tensor:
    """Read `state.tokens` and return the logits after them, (batch, vocab_size)."""

    def attend(qkv: Tensor, layer: DecoderLayer, index: int) -> Tensor:
        return ops.attend(qkv, layer, index, weights.shape, state)

    return _logits(_hidden(weights, state.tokens, ops, attend), weights, ops)


def prefill(
    weights: DecoderWeights,
    tokens: Tensor,
    prompts: PackedPrompts,
    last: Tensor,
    state: DecodeState,
    ops: DecodeOps,
) -> Tensor:
    """Read tokens of prompts, after what is cached of them; return logits after some of the tokens.

    Args:
        weights: Of the model.
        tokens: (tokens,) int64.
        prompts: Whose they are.
        last: (n,) int32: after which of them.
        state: Its keys and values are written.
        ops: What runs.

    Returns:
        (n, vocab_size).
    """

    def attend(qkv: Tensor, layer: DecoderLayer, index: int) -> Tensor:
        return ops.attend_prompts(qkv, layer, index, weights.shape, state, prompts)

    return _logits(_hidden(weights, tokens, ops, attend)[last], weights, ops)


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
