"""The kernels as operators of torch, with what `torch.compile` must know of them.

Which kernel runs is decided inside an operator, from the number of tokens: a compiled model isn't
compiled again between prefill and decoding.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from qtool.runtime.backends.cuda.linear_kernels import KernelWeight
from qtool.runtime.backends.cuda.tiles import Tiles
from qtool.scheme import Shape2D, WeightScheme

WEIGHT = (
    "Tensor planes, Tensor scales, int rows, int inputs, int bits, int? group, bool symmetric, "
    "bool centered, bool fresh"
)
LIBRARY = torch.library.Library("qtool", "DEF")
LIBRARY.define(f"matmul(Tensor x, {WEIGHT}) -> Tensor")
LIBRARY.define(f"rows(Tensor index, ScalarType dtype, {WEIGHT}) -> Tensor")


def matmul_operator(x: Tensor, weight: KernelWeight) -> Tensor:
    """Return x @ W.T for a weight of tiles, shaped (..., out_features), in the dtype of `x`."""
    return torch.ops.qtool.matmul(x, *_flat(weight))


def rows_operator(index: Tensor, weight: KernelWeight) -> Tensor:
    """Return the rows of a weight of tiles that `index` names."""
    return torch.ops.qtool.rows(index, weight.dtype, *_flat(weight))


Flat = tuple[Tensor, Tensor, int, int, int, int | None, bool, bool, bool]


def _flat(weight: KernelWeight) -> Flat:
    scheme, shape, packed = weight.scheme, weight.shape, weight.tiles
    assert packed is not None
    numbers = (shape.out_features, shape.in_features, scheme.num_bits)
    grouping = (scheme.group_size, scheme.symmetric)
    return (packed.planes, packed.scales, *numbers, *grouping, weight.centered, weight.fresh)


def _weight(dtype: torch.dtype, flat: Flat) -> KernelWeight:
    planes, scales, out_features, in_features, *grouping, centered, fresh = flat
    shape = Shape2D(out_features, in_features)
    scheme, packed = _scheme(*grouping), Tiles(planes, scales)
    return KernelWeight(scheme, shape, dtype, packed, None, centered, fresh)


@functools.cache
def _scheme(bits: int, group: int | None, symmetric: bool) -> WeightScheme:  # noqa: FBT001
    return WeightScheme(num_bits=bits, group_size=group, symmetric=symmetric)


RunKernel = Callable[[Tensor, KernelWeight], Tensor]


def implement(run_matmul: RunKernel, run_rows: RunKernel) -> None:
    """Say what the operators do on a card; once."""

    def matmul_there(x: Tensor, *flat: *Flat) -> Tensor:
        return run_matmul(x, _weight(x.dtype, flat))

    def rows_there(index: Tensor, dtype: torch.dtype, *flat: *Flat) -> Tensor:
        return run_rows(index, _weight(dtype, flat))

    LIBRARY.impl("matmul", matmul_there, "CUDA")
    LIBRARY.impl("rows", rows_there, "CUDA")


@torch.library.register_fake("qtool::matmul", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(x: Tensor, *flat: *Flat) -> Tensor:
    return x.new_empty(*x.shape[:-1], flat[2])


@torch.library.register_fake("qtool::rows", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(index: Tensor, dtype: torch.dtype, *flat: *Flat) -> Tensor:
    return index.new_empty(*index.shape, flat[3], dtype=dtype)
