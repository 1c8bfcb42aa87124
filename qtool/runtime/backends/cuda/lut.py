"""Launches of kernels/lut_gemm.cu, which multiplies by a weight just as a checkpoint stores it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.formats import binary_coding
from qtool.runtime.backends.cuda import planes
from qtool.runtime.backends.cuda.centers import CENTERS
from qtool.runtime.backends.cuda.launch import Card, KernelCall, Launch, constants
from qtool.runtime.backends.cuda.splits import add_splits
from qtool.runtime.backends.cuda.tiles import LANES

WORD = 32
"""Inputs of the finest group."""


@dataclass(frozen=True, slots=True)
class TableTuning:
    """What changes the time of the kernel and nothing else: the macros of the same names."""

    keys: int
    rows: int
    threads: int

    @property
    def slab(self) -> int:
        """Return how many inputs a block takes."""
        return LANES * 8 * self.keys

    @property
    def shared_bytes(self) -> int:
        """Return the size of the tables and of the inputs they are built from."""
        return self.keys * (256 * LANES + 8 * (LANES + 1)) * 4


def table_tuning(num_bits: int, out_features: int, card: Card) -> TableTuning:
    """Return what suits a weight.

    Eight words or more of every thread are under way, as many as 64 registers hold, and the
    tables are as large as a block may have.
    """
    rows = {1: 8, 2: 4, 3: 4, 8: 1}.get(num_bits, 2)
    rows = min(rows, 1 << (out_features.bit_length() - 1))
    large = TableTuning(keys=4, rows=rows, threads=1024)
    if large.shared_bytes <= card.shared_bytes:
        return large
    return TableTuning(keys=2, rows=rows, threads=512)


def why_no_tables(tensor: QuantizedTensor) -> str | None:
    """Return why the kernel can't run a weight, a sentence; None: it can."""
    scheme, inputs = tensor.scheme, tensor.shape.in_features
    if tensor.format != binary_coding.BINARY_CODING:
        return f"Kernel lut reads format {binary_coding.BINARY_CODING}, not {tensor.format}."
    if scheme.group_dim != "in_features":
        return f"Kernel lut groups along in_features, not {scheme.group_dim}."
    size = scheme.group_size or inputs
    if size < inputs and size % WORD != 0:
        return f"Kernel lut groups a multiple of {WORD} inputs or whole rows, not {size} inputs."
    return None


def multiply_by_tables(
    x: Tensor, tensor: QuantizedTensor, launch: Launch, card: Card, residual: Tensor | None = None
) -> Tensor:
    """Return x @ W.T, and a residual.

    Args:
        x: (tokens, in_features) float16 or bfloat16, contiguous. Time is linear in tokens.
        tensor: W, of which `why_no_tables` has nothing to say.
        launch: Runs a kernel.
        card: Where.
        residual: (tokens, out_features), added to the product.

    Returns:
        (tokens, out_features) in the dtype of `x`.
    """
    (rows, inputs), scheme, parts, batch = tensor.shape, tensor.scheme, tensor.parts, len(x)
    y = x.new_empty(batch, rows)
    if batch == 0:
        return y
    tuned = table_tuning(scheme.num_bits, rows, card)
    slabs = -(-inputs // tuned.slab)
    partial = x.new_empty(slabs, batch, rows, dtype=torch.float32) if slabs > 1 else None
    offsets = parts.get("plane_offsets", parts.get(CENTERS))
    # One wave of blocks, one on a multiprocessor, and no warp without rows.
    most = -(-rows // (tuned.rows * tuned.threads // LANES))
    blocks = max(1, min(card.multiprocessors // slabs, most))
    macros = constants(
        x.dtype,
        PLANES=scheme.num_bits,
        GROUP=min(scheme.group_size or inputs, inputs),
        OFFSET=2 if CENTERS in parts else int(not scheme.symmetric),
        INPUTS=inputs,
        KEYS=tuned.keys,
        ROWS=tuned.rows,
        THREADS=tuned.threads,
    )
    grid, threads, shared = (blocks, slabs, batch), tuned.threads, tuned.shared_bytes
    call = KernelCall("lut_gemm", "lut_gemm", macros, grid, threads, shared, numbers=(rows,))
    target = y if partial is None else partial
    launch(call, (parts["bit_planes"], parts["plane_scales"], offsets, x, target))
    if partial is None:
        return y if residual is None else y.add_(residual)
    epilogue = "none" if residual is None else "residual"
    add_splits(partial, planes.Target(y), launch, epilogue=epilogue, residual=residual)
    return y
