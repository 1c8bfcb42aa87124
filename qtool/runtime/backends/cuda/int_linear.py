"""Linears of integers on compute capability 9.0: what quantizes x, and what multiplies it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.core.activations import SMALLEST_STEP
from qtool.runtime.backends.cuda.int_tiles import INT_TILE, NUMBERS_BYTES, IntTiles
from qtool.runtime.backends.cuda.launch import LOAD_BYTES, WARP, Card, KernelCall, Launch, constants
from qtool.scheme import ActivationScheme

QUANTIZED_TOGETHER, FEW_ENOUGH_INPUTS = 2, 28672
"""Tokens that a block quantizes, and inputs up to which it holds so many."""
QUANTIZE_THREADS, INPUTS_AT_ONCE = 512, 16
"""Threads at most, and inputs that one writes at once."""
GEMM_THREADS = 384
Y_BYTES = 2 * INT_TILE * 72 * 2
"""Of shared memory, where outputs are turned round."""
SYSTEM_BYTES = 1024


@dataclass(frozen=True, slots=True)
class GemmTuning:
    """How the product is launched; single blocks were the fastest on an H200."""

    stages: int = 6
    """Of the ring in shared memory, at most."""
    cluster: int = 1
    """Blocks that fetch the same tokens together: 1, or 2 where the tiles of rows are even."""


def quantize_call(
    tokens: int, inputs: int, dtype: torch.dtype, scheme: ActivationScheme
) -> KernelCall:
    """Return the launch that makes the codes of tokens, and their steps."""
    rows = QUANTIZED_TOGETHER if inputs <= FEW_ENOUGH_INPUTS else 1
    wanted = -(-inputs // INPUTS_AT_ONCE * rows // WARP) * WARP
    threads = min(QUANTIZE_THREADS, max(WARP, wanted))
    macros = {
        "INPUTS": inputs,
        "ROWS": rows,
        "THREADS": threads,
        "STATIC": int(scheme.scale is not None),
        "CLIPS": int(scheme.scale is not None or scheme.clip_ratio < 1),
        "SHIFTED": int(scheme.rounding != 0),
    }
    largest = float(scheme.largest_code)
    numbers = (
        tokens,
        float(scheme.clip_ratio),
        largest,
        0.5 - scheme.rounding,
        max(float(scheme.scale or 0), SMALLEST_STEP),
    )
    return KernelCall(
        file="quantize_rows",
        kernel="quantize_rows",
        constants=constants(dtype, **macros),
        grid=(_token_tiles(tokens) * INT_TILE // rows, 1, 1),
        threads=threads,
        shared_bytes=threads // WARP * rows * 4,
        numbers=numbers,
    )


def gemm_call(
    tokens: int, weight: IntTiles, dtype: torch.dtype, card: Card, tuning: GemmTuning
) -> KernelCall:
    """Return the launch that multiplies codes by a weight."""
    row_tiles, blocks, _ = weight.tiles.shape
    tiles = row_tiles * _token_tiles(tokens)
    cluster = tuning.cluster if row_tiles % tuning.cluster == 0 else 1
    stage = INT_TILE * INT_TILE + INT_TILE * INT_TILE * weight.bits // 8 + NUMBERS_BYTES + 16
    stages = min(tuning.stages, (card.shared_bytes - SYSTEM_BYTES - Y_BYTES) // stage)
    macros = {
        "BITS": weight.bits,
        "SPAN": weight.span,
        "STAGES": stages,
        "CLUSTER": cluster,
    }
    blocks_at_once = min(tiles, card.multiprocessors) // cluster * cluster
    return KernelCall(
        file="int_gemm",
        kernel="int_gemm",
        constants=constants(dtype, **macros),
        grid=(blocks_at_once, 1, 1),
        threads=GEMM_THREADS,
        shared_bytes=stages * stage + Y_BYTES,
        numbers=(weight.shape.out_features, tokens, row_tiles, _token_tiles(tokens), blocks),
        one_architecture=True,
    )


def int_linear(
    x: Tensor,
    weight: IntTiles,
    scheme: ActivationScheme,
    launch: Launch,
    card: Card,
    tuning: GemmTuning = GemmTuning(),
) -> Tensor:
    """Return x @ W.T with x quantized: (tokens, in_features) -> (tokens, out_features).

    Args:
        x: float16 or bfloat16, contiguous.
        weight: W.
        scheme: How x is quantized: codes are those of `quantize_activations`, to the bit.
        launch: Runs a kernel.
        card: Where.
        tuning: How the product is launched.
    """
    tokens, inputs = x.shape
    y = x.new_empty(tokens, weight.shape.out_features)
    if tokens == 0:
        return y
    if x.data_ptr() % LOAD_BYTES != 0:  # a slice of something
        x = x.clone()
    padded = _token_tiles(tokens) * INT_TILE
    codes = x.new_empty(padded * inputs, dtype=torch.int8)
    steps = x.new_empty(padded, dtype=torch.float32)
    launch(quantize_call(tokens, inputs, x.dtype, scheme), (x, codes, steps))
    launch(gemm_call(tokens, weight, x.dtype, card, tuning), (weight.tiles, codes, steps, y))
    return y


def _token_tiles(tokens: int) -> int:
    return -(-tokens // INT_TILE)
