"""The operations of a decoding step by the kernels; what launches is passed in."""

from collections.abc import Callable, Iterable
from math import e, log2

import torch
from torch import Tensor
from torch.nn import functional

from qtool.runtime.backends.cuda import linear_kernels
from qtool.runtime.backends.cuda.attention_grid import attention_grid, heads_per_block, splits_for
from qtool.runtime.backends.cuda.expert_products import are_tiled, run_experts
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.launch import (
    KERNEL_DTYPES,
    WARP,
    Card,
    KernelCall,
    Launch,
    constants,
)
from qtool.runtime.backends.cuda.mixed import MixedWeight, gather_mixed, multiply_mixed
from qtool.runtime.backends.cuda.ordered import OrderedWeight
from qtool.runtime.backends.cuda.peer_products import Peers, summed_product
from qtool.runtime.decode import torch_ops
from qtool.runtime.decode.ops import DecodeOps, DecodeState, Norm
from qtool.runtime.decode.prompts import PackedPrompts, attend_to_cache
from qtool.runtime.decode.weights import (
    DecoderExperts,
    DecoderLayer,
    DecoderShape,
    DecoderWeights,
    Projection,
    Projections,
    RankPart,
)

GREEDY_THREADS = 1024
MOST_NORM_THREADS = 1024
NUCLEUS_THREADS, NUCLEUS_BYTES, NUCLEUS_BINS = 1024, 41472, 2048
TOKENS_OF_BLOCK = 8 * NUCLEUS_THREADS
MOST_TOKENS_DRAWN_FROM = 32 * TOKENS_OF_BLOCK
HEADS_OF_BLOCK = 4
"""Of kernels/prompt_heads.cu: one of each warp."""
HEAD_DIMS = range(8, 257, 8)


class KernelOps:
    """Runs on one card, in float16 or bfloat16; dense projections go through torch."""

    def __init__(
        self,
        launch: Launch,
        card: Card,
        compile_calls: Callable[[Iterable[KernelCall]], None] | None = None,
        peers: Peers | None = None,
    ) -> None:
        self._launch, self._card, self._compile = launch, card, compile_calls
        self._peers = peers

    def compile_ahead(self, run: Callable[[DecodeOps], object]) -> None:
        """List what `run` launches, and compile that side by side."""
        if self._compile is not None:
            calls: list[KernelCall] = []
            run(KernelOps(lambda call, _: calls.append(call), self._card, peers=self._peers))
            self._compile(calls)

    def embed(self, tokens: Tensor, table: Projection) -> Tensor:
        """Return the rows of the tokens."""
        if isinstance(table, KernelWeight):
            return linear_kernels.rows(tokens, table, self._launch)
        if isinstance(table, MixedWeight):
            return gather_mixed(tokens, table, self._launch)
        return torch_ops.OPS.embed(tokens, table)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return x / rms(x) * weight."""
        rows, hidden = x.shape
        y = torch.empty_like(x)
        if rows > 0:
            threads = min(MOST_NORM_THREADS, -(-hidden // (8 * WARP)) * WARP)
            macros, grid = constants(x.dtype, HIDDEN=hidden, THREADS=threads), (rows, 1, 1)
            shared, numbers = threads // WARP * 4, (float(eps),)
            call = KernelCall("rms_norm", "rms_norm", macros, grid, threads, shared, numbers)
            self._launch(call, (x, weight, y))
        return y

    def linear(
        self,
        x: Tensor,
        projection: Projections,
        residual: Tensor | None = None,
        norm: Norm | None = None,
    ) -> Tensor:
        """Return x @ W.T + residual, of x normed."""
        if isinstance(projection, KernelWeight):
            x, norm = self._normed(x, projection, norm)
            where = (self._launch, self._card)
            return linear_kernels.matmul(x, projection, *where, residual=residual, norm=norm)
        if isinstance(projection, tuple):
            y = self._side_by_side(x, projection, norm)
            return y if residual is None else y + residual
        x = x if norm is None else self.rms_norm(x, *norm)
        if isinstance(projection, OrderedWeight):
            placed = projection.placed(x, self._launch)
            return self.linear(placed, projection.weight, residual)
        if isinstance(projection, MixedWeight):
            y = multiply_mixed(x, projection, self._launch, self._card)
        else:
            y = functional.linear(x, torch_ops.dense(projection))
        return y if residual is None else y.add_(residual)

    def summed(self, x: Tensor, part: RankPart, residual: Tensor | None = None) -> Tensor | None:
        """Return the sum over ranks of x @ W.T + residual, of few tokens and even parts."""
        weight = part.weight
        if self._peers is None or not part.is_even or not isinstance(weight, KernelWeight):
            return None
        return summed_product(x, weight, self._launch, self._card, self._peers, residual)

    def _side_by_side(self, x: Tensor, parts: tuple[Projection, ...], norm: Norm | None) -> Tensor:
        """Return the outputs of several projections of x normed; each writes to its place."""
        kept = [part for part in parts if isinstance(part, KernelWeight)]
        whole = len(kept) == len(parts)
        if norm is not None and not (
            whole and all(linear_kernels.can_norm(part, len(x), self._card) for part in kept)
        ):
            x, norm = self.rms_norm(x, *norm), None
        if not whole:
            return torch.cat([self.linear(x, part) for part in parts], dim=-1)
        rows = [part.shape.out_features for part in kept]
        y = x.new_empty(len(x), sum(rows))
        for part, own in zip(kept, y.split(rows, dim=1), strict=True):
            linear_kernels.matmul_into(own, x, part, self._launch, self._card, norm)
        return y

    def gated(self, x: Tensor, gate_up: Projections, norm: Norm | None = None) -> Tensor:
        """Return silu(x @ gate.T) * (x @ up.T), of x normed."""
        if isinstance(gate_up, KernelWeight):
            x, norm = self._normed(x, gate_up, norm, gated=True)
            where = (self._launch, self._card)
            return linear_kernels.matmul(x, gate_up, *where, gated=True, norm=norm)
        return torch_ops.silu_times(self.linear(x, gate_up, norm=norm))

    def _normed(
        self, x: Tensor, weight: KernelWeight, norm: Norm | None, *, gated: bool = False
    ) -> tuple[Tensor, Norm | None]:
        """Return what a product takes: x and a norm that it does itself, or x normed."""
        if norm is None or linear_kernels.can_norm(weight, len(x), self._card, gated=gated):
            return x, norm
        return self.rms_norm(x, *norm), None

    def experts(self, x: Tensor, experts: DecoderExperts) -> Tensor:
        """Return what the chosen experts of each token say, weighed and summed."""
        if are_tiled(experts):
            return run_experts(x, experts, self, self._launch, self._card)
        return torch_ops.OPS.experts(x, experts)

    def attend(
        self, qkv: Tensor, layer: DecoderLayer, index: int, shape: DecoderShape, state: DecodeState
    ) -> Tensor:
        """Store the keys and values of the new tokens and attend to all until them."""
        assert state.scratch is not None
        batch, max_length = len(qkv), state.keys.shape[3]
        blocks, splits = state.scratch.shape[1] // shape.num_key_value_heads, state.scratch.shape[2]
        heads, dim = shape.group // blocks, shape.head_dim
        output = qkv.new_empty(batch, shape.num_heads * dim)
        is_int8 = int(state.keys.dtype == torch.int8)
        grid = attention_grid(self._card, heads, dim, state.keys.dtype)
        macros = {
            "BLOCKS": blocks,
            "INT8_CACHE": is_int8,
            "QK_NORM": int(layer.query_norm is not None),
        }
        call = KernelCall(
            file="decode_attention",
            kernel="decode_attention",
            constants=constants(qkv.dtype, **macros, **grid.macros),
            grid=(splits, shape.num_key_value_heads * blocks, batch),
            threads=grid.warps * WARP,
            shared_bytes=grid.shared_bytes,
            numbers=(
                *(shape.attention_scale * log2(e), float(shape.norm_eps)),
                *(shape.num_key_value_heads, max_length, index, len(state.keys)),
            ),
        )
        sides = (state.keys, state.values, state.key_scales, state.value_scales)
        norms = (qkv, layer.qkv_bias, layer.query_norm, layer.key_norm)
        places = (state.rotary, state.positions, state.steps)
        cache = [None if one is None else one[index] for one in sides]
        self._launch(call, (*norms, *places, *cache, state.scratch, output))
        return output

    def attend_prompts(
        self,
        qkv: Tensor,
        layer: DecoderLayer,
        index: int,
        shape: DecoderShape,
        state: DecodeState,
        prompts: PackedPrompts,
    ) -> Tensor:
        """Turn queries in place, store keys and values, attend; by torch over an int8 cache."""
        if state.key_scales is not None:
            return torch_ops.OPS.attend_prompts(qkv, layer, index, shape, state, prompts)
        tokens, dim, kv_heads = len(qkv), shape.head_dim, shape.num_key_value_heads
        norms = (qkv, layer.qkv_bias, layer.query_norm, layer.key_norm)
        places = (state.rotary, prompts.positions, prompts.slots)
        keys, values = state.keys[index], state.values[index]
        heads = shape.num_heads + 2 * kv_heads
        macros = {"HEAD_DIM": dim, "QK_NORM": int(layer.query_norm is not None)}
        call = KernelCall(
            file="prompt_heads",
            kernel="prompt_heads",
            constants=constants(qkv.dtype, **macros),
            grid=(tokens, -(-heads // HEADS_OF_BLOCK), 1),
            threads=HEADS_OF_BLOCK * WARP,
            shared_bytes=0,
            numbers=(float(shape.norm_eps), shape.num_heads, kv_heads, keys.shape[2]),
        )
        self._launch(call, (*norms, *places, keys, values))
        query = qkv.view(tokens, heads, dim)[:, : shape.num_heads]
        return attend_to_cache(query, keys, values, prompts, shape.attention_scale)

    def choose(self, logits: Tensor, state: DecodeState) -> None:
        """Take the likeliest tokens and move on."""
        buffers = (state.tokens, state.positions, state.history, state.steps)
        macros, grid = constants(logits.dtype), (len(logits), 1, 1)
        threads, shared = GREEDY_THREADS, GREEDY_THREADS // WARP * 8
        numbers = (logits.shape[1], state.history.shape[1])
        call = KernelCall("greedy", "greedy", macros, grid, threads, shared, numbers)
        self._launch(call, (logits, *buffers))

    def draw(self, logits: Tensor, likeliest: Tensor, options: Tensor) -> Tensor | None:
        """Return tokens of logits of 16 bits; None for others."""
        rows, vocabulary = logits.shape
        if logits.dtype not in KERNEL_DTYPES or vocabulary > MOST_TOKENS_DRAWN_FROM:
            return None
        tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
        call = KernelCall(
            file="nucleus",
            kernel="nucleus",
            constants=constants(logits.dtype),
            grid=(-(-vocabulary // TOKENS_OF_BLOCK), rows, 1),
            threads=NUCLEUS_THREADS,
            shared_bytes=NUCLEUS_BYTES,
            numbers=(vocabulary,),
            zeros=rows * (NUCLEUS_BINS + 1),
        )
        moved = options.to(logits.device, non_blocking=True)
        self._launch(call, (logits.contiguous(), likeliest.contiguous(), moved, tokens))
        return tokens

    def scratch(
        self, shape: DecoderShape, batch: int, max_length: int, device: torch.device
    ) -> Tensor:
        """Return room for the parts of all splits but that of the last, each float with a mark."""
        heads = heads_per_block(shape.group, shape.head_dim)
        rows = shape.num_key_value_heads * (shape.group // heads)
        splits = splits_for(self._card, rows * batch, max_length)
        size = (batch, rows, splits, heads * (shape.head_dim + 2))
        return torch.zeros(size, dtype=torch.int64, device=device)

    def whole_step(
        self, weights: DecoderWeights, state: DecodeState
    ) -> Callable[[], Tensor] | None:
        """Return None: a step is a graph of the operations."""
        del weights, state
        return None
