"""A decoding step and a prefill: functions of weights, buffers and operations."""

from collections.abc import Callable

from torch import Tensor

from qtool.runtime.decode.ops import DecodeOps, DecodeState, Norm
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
        qkv = ops.linear(x, layer.qkv, norm=Norm(layer.input_norm, eps))
        x = ops.linear(attend(qkv, layer, index), layer.output, x)
        norm = Norm(layer.mlp_norm, eps)
        if layer.experts is not None:
            x = x + ops.experts(ops.rms_norm(x, *norm), layer.experts)
        elif layer.down is not None:
            x = ops.linear(ops.gated(x, layer.gate_up, norm), layer.down, x)
    return x


def _logits(x: Tensor, weights: DecoderWeights, ops: DecodeOps) -> Tensor:
    norm = Norm(weights.final_norm, weights.shape.norm_eps)
    return ops.linear(x, weights.head, norm=norm)
