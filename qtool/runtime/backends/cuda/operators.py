"""The kernels as operators of torch, with what `torch.compile` must know of them.

Which kernel runs is decided inside an operator, from the number of tokens: a compiled model isn't
compiled again between prefill and decoding.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from qtool.runtime.backends.cuda.int_tiles import IntTiles
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.mixed import MixedWeight
from qtool.runtime.backends.cuda.panels import Panels
from qtool.runtime.backends.cuda.tiles import Tiles
from qtool.scheme import ActivationScheme, GroupDim, Shape2D, WeightScheme

WEIGHT = (
    "Tensor planes, Tensor scales, int rows, int inputs, int group_rows, int bits, int? group, "
    "bool symmetric, bool centered, bool fresh"
)
LIBRARY = torch.library.Library("qtool", "DEF")
LIBRARY.define(f"matmul(Tensor x, {WEIGHT}) -> Tensor")
LIBRARY.define(f"rows(Tensor index, ScalarType dtype, {WEIGHT}) -> Tensor")
MIXED = (
    "Tensor[] planes, Tensor[] scales, Tensor[] places, Tensor numbers, int inputs, int[] bits, "
    "int? group, bool symmetric"
)
LIBRARY.define(f"mixed_matmul(Tensor x, {MIXED}) -> Tensor")
LIBRARY.define(f"mixed_rows(Tensor index, ScalarType dtype, {MIXED}) -> Tensor")
LIBRARY.define(
    "int_linear(Tensor x, Tensor tiles, int rows, int inputs, int bits, int span, int input_bits, "
    "float clip_ratio, float rounding, float? scale) -> Tensor"
)


def matmul_operator(x: Tensor, weight: KernelWeight) -> Tensor:
    """Return x @ W.T for tiles or panels, shaped (..., out_features), in the dtype of `x`."""
    return torch.ops.qtool.matmul(x, *_flat(weight))


def rows_operator(index: Tensor, weight: KernelWeight) -> Tensor:
    """Return the rows of a weight of tiles or panels that `index` names."""
    return torch.ops.qtool.rows(index, weight.dtype, *_flat(weight))


def mixed_matmul_operator(x: Tensor, weight: MixedWeight) -> Tensor:
    """Return x @ W.T for classes of tiles, shaped (..., out_features), in the dtype of `x`."""
    return torch.ops.qtool.mixed_matmul(x, *_flat_mixed(weight))


def mixed_rows_operator(index: Tensor, weight: MixedWeight) -> Tensor:
    """Return the rows of a weight of classes of tiles that `index` names."""
    return torch.ops.qtool.mixed_rows(index, weight.dtype, *_flat_mixed(weight))


def int_linear_operator(x: Tensor, weight: IntTiles, scheme: ActivationScheme) -> Tensor:
    """Return x @ W.T with x quantized, shaped (..., out_features), in the dtype of `x`."""
    inputs = (scheme.num_bits, scheme.clip_ratio, scheme.rounding, scheme.scale)
    return torch.ops.qtool.int_linear(
        x, weight.tiles, *weight.shape, weight.bits, weight.span, *inputs
    )


Flat = tuple[Tensor, Tensor, int, int, int, int, int | None, bool, bool, bool]


def _flat(weight: KernelWeight) -> Flat:
    scheme, shape, packed = weight.scheme, weight.shape, weight.tiles or weight.panels
    assert packed is not None
    group_rows = packed.group_rows if isinstance(packed, Panels) else 0
    numbers = (shape.out_features, shape.in_features, group_rows, scheme.num_bits)
    grouping = (scheme.group_size, scheme.symmetric)
    return (packed.planes, packed.scales, *numbers, *grouping, weight.centered, weight.fresh)


def _weight(dtype: torch.dtype, flat: Flat) -> KernelWeight:
    planes, scales, out_features, in_features, group_rows, *grouping, centered, fresh = flat
    shape = Shape2D(out_features, in_features)
    panels = Panels(planes, scales, group_rows) if group_rows else None
    packed = None if panels else Tiles(planes, scales)
    scheme = _scheme(*grouping, "out_features" if panels else "in_features")
    return KernelWeight(scheme, shape, dtype, packed, None, centered, fresh, panels)


@functools.cache
def _scheme(
    bits: int,
    group: int | None,
    symmetric: bool,  # noqa: FBT001 - a key of the cache
    group_dim: GroupDim = "in_features",
) -> WeightScheme:
    return WeightScheme(num_bits=bits, group_size=group, group_dim=group_dim, symmetric=symmetric)


FlatMixed = tuple[
    list[Tensor], list[Tensor], list[Tensor], Tensor, int, list[int], int | None, bool
]


def _flat_mixed(weight: MixedWeight) -> FlatMixed:
    packed = [part.tiles for part in weight.classes if part.tiles is not None]
    planes, scales = [each.planes for each in packed], [each.scales for each in packed]
    scheme = weight.classes[0].scheme
    bits = [part.scheme.num_bits for part in weight.classes]
    numbers = (weight.numbers, weight.shape.in_features, bits)
    return (planes, scales, list(weight.places), *numbers, scheme.group_size, scheme.symmetric)


def _mixed_weight(dtype: torch.dtype, flat: FlatMixed) -> MixedWeight:
    planes, scales, places, numbers, inputs, bits, group, symmetric = flat
    classes = []
    for one, parameters, rows, num_bits in zip(planes, scales, places, bits, strict=True):
        scheme, shape = _scheme(num_bits, group, symmetric), Shape2D(len(rows), inputs)
        classes.append(KernelWeight(scheme, shape, dtype, Tiles(one, parameters), None))
    whole = Shape2D(len(numbers), inputs)
    return MixedWeight(classes[0].scheme, whole, tuple(classes), tuple(places), numbers)


RunKernel = Callable[[Tensor, KernelWeight], Tensor]
RunMixed = Callable[[Tensor, MixedWeight], Tensor]


def implement_mixed(run_matmul: RunMixed, run_rows: RunMixed) -> None:
    """Say what the operators of weights with classes of rows do on a card; once."""

    def matmul_there(x: Tensor, *flat: *FlatMixed) -> Tensor:
        return run_matmul(x, _mixed_weight(x.dtype, flat))

    def rows_there(index: Tensor, dtype: torch.dtype, *flat: *FlatMixed) -> Tensor:
        return run_rows(index, _mixed_weight(dtype, flat))

    LIBRARY.impl("mixed_matmul", matmul_there, "CUDA")
    LIBRARY.impl("mixed_rows", rows_there, "CUDA")


FlatIntegers = tuple[Tensor, int, int, int, int, int, float, float, float | None]
RunIntegers = Callable[[Tensor, IntTiles, ActivationScheme], Tensor]


def implement_integers(run: RunIntegers) -> None:
    """Say what the operator of quantized inputs does on a card; once."""

    def linear_there(x: Tensor, *flat: *FlatIntegers) -> Tensor:
        tiles, rows, inputs, bits, span, *activation = flat
        weight = IntTiles(tiles, Shape2D(rows, inputs), bits, span)
        return run(x, weight, _activation_scheme(*activation))

    LIBRARY.impl("int_linear", linear_there, "CUDA")


@functools.cache
def _activation_scheme(
    num_bits: int, clip_ratio: float, rounding: float, scale: float | None
) -> ActivationScheme:
    return ActivationScheme(
        num_bits=num_bits,
        granularity="token" if scale is None else "tensor",
        clip_ratio=clip_ratio,
        rounding=rounding,
        scale=scale,
    )


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


@torch.library.register_fake("qtool::mixed_matmul", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(x: Tensor, *flat: *FlatMixed) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(flat[3]))


@torch.library.register_fake("qtool::int_linear", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(x: Tensor, *flat: *FlatIntegers) -> Tensor:
    return x.new_empty(*x.shape[:-1], flat[1])


@torch.library.register_fake("qtool::mixed_rows", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(index: Tensor, dtype: torch.dtype, *flat: *FlatMixed) -> Tensor:
    return index.new_empty(*index.shape, flat[4], dtype=dtype)
