"""Which kernel runs a weight, on which grid, with which arguments.

What launches is passed in, so all but the launch itself is tested without a card:
tests/kernels/host.py launches the same text on a CPU.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.errors import BackendError
from qtool.runtime import lut, planes, tiles
from qtool.runtime.centers import CENTERS, planes_of, weight_of
from qtool.runtime.launch import Card, KernelCall, Launch, constants
from qtool.runtime.selection import STORED_KERNELS, selection_for, wanted_kernel
from qtool.runtime.tiles import UNIT, Tiles
from qtool.scheme import Shape2D, WeightScheme

RUN = 8
"""Rows of gate, then of up, in a tile."""
SIGN_FLIP_THREADS, SIGN_FLIP_ROWS = 256, 8
DEQUANTIZE_THREADS, DEQUANTIZE_WARPS = 128, 4
ROW_DIM = -2
"""Of every stored part, where groups run along in_features."""
LOAD_BYTES = 16
"""Bytes: what the kernels load at once."""
FINEST_GROUP = 32
"""Inputs of the finest group that the tiled kernels take."""


@dataclass(frozen=True, slots=True)
class KernelWeight:
    """A binary-coded weight, ready for the kernels."""

    scheme: WeightScheme
    shape: Shape2D
    dtype: torch.dtype
    """Of the activations."""
    tiles: Tiles | None
    """None: the tiled kernels can't group its inputs."""
    stored: QuantizedTensor | None
    """The parts as stored, if they were to be kept or there are no tiles."""
    centered: bool = False
    """It was affine: instead of offsets there are centers, see `centers`."""
    fresh: bool = False
    """Made just now on the device: kernels may not read it ahead."""

    @property
    def layout(self) -> planes.Layout:
        """Return what the tiled kernels are compiled for."""
        inputs = self.shape.in_features
        size = self.scheme.group_size or inputs
        group = size if size < inputs else -(-inputs // UNIT) * UNIT
        offset = 2 if self.centered else int(not self.scheme.symmetric)
        return planes.Layout(self.scheme.num_bits, group, offset)


def prepare(
    tensor: QuantizedTensor, dtype: torch.dtype, *, keep_stored: bool = False
) -> KernelWeight:
    """Re-lay a weight of format `binary_coding`, or of `affine`.

    Args:
        tensor: The weight, on the device that runs it.
        dtype: Of the activations.
        keep_stored: Hold on to the stored parts, which the kernel `lut` reads.
    """
    tensor = planes_of(tensor)
    scheme, inputs = tensor.scheme, tensor.shape.in_features
    size = scheme.group_size or inputs
    tileable = scheme.group_dim == "in_features" and (size % FINEST_GROUP == 0 or size >= inputs)
    return KernelWeight(
        scheme=scheme,
        shape=tensor.shape,
        dtype=dtype,
        tiles=tiles.pack(tensor) if tileable else None,
        stored=tensor if keep_stored or not tileable else None,
        centered=CENTERS in tensor.parts,
    )


def fuse(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor | None:
    """Put weights that share an input one below the other; None if their schemes differ."""
    tensors = [planes_of(tensor) for tensor in tensors]
    first = tensors[0]
    for other in tensors[1:]:
        alike = other.parts.keys() == first.parts.keys() and other.scheme == first.scheme
        if not alike or other.shape.in_features != first.shape.in_features:
            return None
    if first.scheme.group_dim != "in_features":
        return None
    rows = sum(tensor.shape.out_features for tensor in tensors)
    parts = {
        name: torch.cat([tensor.parts[name] for tensor in tensors], dim=ROW_DIM)
        for name in first.parts
    }
    shape = Shape2D(rows, first.shape.in_features)
    return QuantizedTensor(first.format, first.scheme, shape, parts)


def interleave(gate: QuantizedTensor, up: QuantizedTensor) -> QuantizedTensor | None:
    """Let eight rows of gate and eight of up alternate; None where that can't be."""
    fused = fuse([gate, up])
    if fused is None or gate.shape != up.shape or gate.shape.out_features % RUN != 0:
        return None
    order = interleaved_order(gate.shape.out_features)
    parts = {
        name: part.index_select(ROW_DIM, order.to(part.device))
        for name, part in fused.parts.items()
    }
    return QuantizedTensor(fused.format, fused.scheme, fused.shape, parts)


def interleaved_order(rows: int) -> Tensor:
    """Return where the rows of [gate; up] go: (2 rows,) int64."""
    return torch.arange(2 * rows).view(2, rows // RUN, RUN).transpose(0, 1).flatten()


def kernel_for(weight: KernelWeight, tokens: int, card: Card) -> str:
    """Return the name of the kernel that multiplies so many tokens."""
    wanted = wanted_kernel()
    if wanted is not None:
        return wanted
    shape, num_bits = weight.shape, weight.scheme.num_bits
    weights = shape.out_features * shape.in_features
    if tokens > selection_for(card.name).most_tokens(num_bits, weights):
        return "dequantize"
    if weight.tiles is None:
        return "sign_flip"
    row_tiles, units, *_ = weight.tiles.planes.shape
    room = planes.tuned_plan(row_tiles, units, tokens or 1, weight.layout, card=card)
    return "dequantize" if room is None else "planes"


def matmul(  # noqa: PLR0913 - what, by what, where, and what comes after
    x: Tensor,
    weight: KernelWeight,
    launch: Launch,
    card: Card,
    *,
    kernel: str | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """Return x @ W.T.

    Args:
        x: (tokens, in_features) float16 or bfloat16, contiguous.
        weight: W.
        launch: Runs a kernel.
        card: Where.
        kernel: One of KERNELS; None: `kernel_for`.
        residual: (tokens, out_features), added to the product.
        gated: Rows of W are those of `interleave`: return silu(gate) * up.

    Returns:
        (tokens, out_features) in the dtype of `x`; half as wide if gated.

    Raises:
        BackendError: the kernel asked for can't run this weight.
    """
    tokens = x.shape[0]
    kernel = kernel or kernel_for(weight, tokens, card)
    if x.data_ptr() % LOAD_BYTES != 0:  # a slice of something
        x = x.clone()
    if kernel == "planes" and weight.tiles is not None and tokens > 0:
        epilogue = "gated" if gated else "none" if residual is None else "residual"
        return planes.multiply_planes(
            x,
            weight.tiles,
            weight.shape.out_features,
            weight.layout,
            launch,
            card,
            epilogue=epilogue,
            residual=residual,
            dependent=not weight.fresh,
        )
    y = _plain(x, weight, launch, card, kernel)
    if gated:
        pairs = y.unflatten(-1, (-1, 2, RUN))
        gate, up = pairs[..., 0, :].flatten(-2), pairs[..., 1, :].flatten(-2)
        return torch.nn.functional.silu(gate) * up
    return y if residual is None else y + residual


def _plain(x: Tensor, weight: KernelWeight, launch: Launch, card: Card, kernel: str) -> Tensor:
    if len(x) == 0:
        return x.new_empty(0, weight.shape.out_features)
    if kernel == "dequantize":
        return torch.nn.functional.linear(x, dense_weight(weight, launch))
    if kernel not in STORED_KERNELS:
        raise BackendError(
            f"Kernel {kernel!r} can't run this weight ({weight.scheme}); dequantize and sign_flip "
            "can."
        )
    if weight.stored is None:
        raise BackendError(
            f"Kernel {kernel!r} reads a weight as it is stored, and prepare wasn't told to keep "
            "that (keep_stored)."
        )
    if kernel == "sign_flip":
        return _by_definition(x, weight.stored, launch)
    reason = lut.why_no_tables(weight.stored)
    if reason is not None:
        raise BackendError(reason)
    return lut.multiply_by_tables(x, weight.stored, launch, card)


def _by_definition(x: Tensor, tensor: QuantizedTensor, launch: Launch) -> Tensor:
    (rows, inputs), scheme, parts = tensor.shape, tensor.scheme, tensor.parts
    y, offsets = x.new_empty(len(x), rows), parts.get("plane_offsets", parts.get(CENTERS))
    launch(
        KernelCall(
            "sign_flip",
            "sign_flip",
            constants(x.dtype),
            (-(-rows // SIGN_FLIP_ROWS), len(x), 1),
            SIGN_FLIP_THREADS,
            0,
            (
                *(rows, inputs, parts["bit_planes"].shape[2], scheme.num_bits),
                scheme.group_size or scheme.grouped_length(tensor.shape),
                scheme.num_groups(tensor.shape),
                int(CENTERS in parts),
                int(scheme.group_dim == "in_features"),
            ),
        ),
        (parts["bit_planes"], parts["plane_scales"], offsets, x, y),
    )
    return y


@functools.lru_cache(1024)  # not all lengths of prompts for ever
def _dequantize_call(
    kernel: str, sizes: tuple[int, ...], blocks: int, layout: planes.Layout, dtype: torch.dtype
) -> KernelCall:
    """Return a launch of kernels/dequantize.cu, made once for all weights of one shape."""
    macros, grid = constants(dtype, **layout.macros), (blocks, 1, 1)
    return KernelCall("dequantize", kernel, macros, grid, DEQUANTIZE_THREADS, 0, sizes)


def dense_weight(weight: KernelWeight, launch: Launch) -> Tensor:
    """Return W, (out_features, in_features) in the dtype of the activations."""
    if weight.tiles is None:
        assert weight.stored is not None
        return weight_of(weight.stored).to(weight.dtype)
    packed, (rows, inputs) = weight.tiles, weight.shape
    row_tiles, units, *_ = packed.planes.shape
    dense = torch.empty(rows, inputs, dtype=weight.dtype, device=packed.planes.device)
    sizes = (rows, inputs, row_tiles, units, packed.scales.shape[1])
    blocks = -(-row_tiles * units // DEQUANTIZE_WARPS)
    call = _dequantize_call("dequantize", sizes, blocks, weight.layout, weight.dtype)
    tensors = (packed.planes, packed.scales, dense)
    launch(call._replace(dependent=False) if weight.fresh else call, tensors)
    return dense


def rows(index: Tensor, weight: KernelWeight, launch: Launch) -> Tensor:
    """Return the rows that `index` names: (*index.shape, in_features)."""
    if weight.tiles is None:
        return dense_weight(weight, launch)[index]
    if index.numel() == 0:
        return torch.empty(
            *index.shape, weight.shape.in_features, dtype=weight.dtype, device=index.device
        )
    packed, inputs = weight.tiles, weight.shape.in_features
    flat = index.flatten().to(torch.int64).contiguous()
    found = torch.empty(len(flat), inputs, dtype=weight.dtype, device=packed.planes.device)
    sizes = (weight.shape.out_features, inputs, packed.planes.shape[1], packed.scales.shape[1])
    call = _dequantize_call("gather_rows", sizes, len(flat), weight.layout, weight.dtype)
    launch(call, (packed.planes, packed.scales, flat, found))
    return found.view(*index.shape, inputs)
