"""Which kernel runs a weight, on which grid, with which arguments.

What launches is passed in, so all but the launch itself is tested without a card:
tests/kernels/host.py launches the same text on a CPU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.formats import affine, binary_coding
from qtool.runtime import tiles
from qtool.runtime.launch import Call, Card, Launch
from qtool.runtime.tiles import TILE_ROWS, UNIT, Tiles

MAX_TOKENS = 16
"""With more tokens a dequantized weight and torch's matrix product are faster."""
THREADS, WARPS = 256, 8
DEQUANTIZE_THREADS, DEQUANTIZE_WARPS = 128, 4
BLOCK = 32
"""Inputs of the finest group that the tiled kernels take."""


@dataclass(frozen=True, slots=True)
class KernelWeight:
    """A binary-coded weight, ready for the kernels."""

    tensor: QuantizedTensor
    tiles: Tiles | None
    """None: the tiled kernels can't group its inputs."""
    dtype: torch.dtype
    """Of the activations."""

    @property
    def constants(self) -> dict[str, int]:
        """Return the macros of the tiled kernels."""
        scheme, inputs = self.tensor.scheme, self.tensor.shape.in_features
        whole = -(-inputs // UNIT) * UNIT
        size = scheme.group_size or inputs
        values = {"PLANES": scheme.num_bits, "GROUP": size if size < inputs else whole}
        values["OFFSET"] = int(not scheme.symmetric)
        return values | self.activation

    @property
    def activation(self) -> dict[str, int]:
        """Return the macro that names the dtype of the activations."""
        return {"ACTIVATION_BF16": 1} if self.dtype == torch.bfloat16 else {}


def prepare(tensor: QuantizedTensor, dtype: torch.dtype) -> KernelWeight:
    """Re-lay a weight of format `binary_coding`, or of `affine`: its offsets round to float16."""
    if tensor.format == affine.FORMAT:
        tensor = binary_coding.from_affine(tensor, torch.float16)
    scheme, inputs = tensor.scheme, tensor.shape.in_features
    size = scheme.group_size or inputs
    tileable = scheme.group_dim == "in_features" and (size % BLOCK == 0 or size >= inputs)
    return KernelWeight(tensor, tiles.pack(tensor) if tileable else None, dtype)


def matmul(x: Tensor, weight: KernelWeight, launch: Launch, card: Card) -> Tensor:
    """Return x @ W.T.

    Args:
        x: (tokens, in_features) float16 or bfloat16, contiguous.
        weight: W.
        launch: Runs a kernel.
        card: Where.

    Returns:
        (tokens, out_features) in the dtype of `x`.
    """
    if len(x) == 0:
        return x.new_empty(0, weight.tensor.shape.out_features)
    if len(x) > MAX_TOKENS:
        return torch.nn.functional.linear(x, dequantize(weight, launch))
    if weight.tiles is None:
        return _by_definition(x, weight, launch)
    return _by_planes(x, weight, weight.tiles, launch, card)


def _by_planes(
    x: Tensor, weight: KernelWeight, packed: Tiles, launch: Launch, card: Card
) -> Tensor:
    shape, batch = weight.tensor.shape, len(x)
    row_tiles, units = packed.planes.shape[:2]
    columns = 1 if batch == 1 else 8
    fixed = (WARPS * TILE_ROWS + 1) * columns * 4
    per_unit = UNIT // BLOCK * columns * (2 * BLOCK + 4)
    most = (card.shared_bytes - fixed) // per_unit
    wanted = -(-card.multiprocessors // row_tiles)  # a split more costs little, an idle one a lot
    per_split = min(most, max(WARPS, -(-units // wanted)), units)
    splits = -(-units // per_split)
    padded = row_tiles * TILE_ROWS
    y = x.new_empty(batch, shape.out_features)
    partial = x.new_empty(splits, batch, padded, dtype=torch.float32) if splits > 1 else None
    blocks = min(row_tiles, max(1, 2 * card.multiprocessors // splits))
    launch(
        Call(
            "bit_plane_mma",
            "bit_plane_mma",
            {**weight.constants, "COLUMNS": columns},
            (blocks, splits, -(-batch // columns)),
            THREADS,
            per_split * per_unit + fixed,
            (
                *(packed.planes, packed.scales, x, y, partial),
                *(shape.out_features, shape.in_features, batch),
                *(row_tiles, units, packed.scales.shape[1], per_split),
            ),
        )
    )
    if partial is not None:
        grid = (-(-shape.out_features // THREADS), batch, 1)
        sizes = (shape.out_features, padded, batch, splits)
        arguments = (partial, y, *sizes)
        launch(Call("add_splits", "add_splits", weight.activation, grid, THREADS, 0, arguments))
    return y


def _by_definition(x: Tensor, weight: KernelWeight, launch: Launch) -> Tensor:
    tensor, (rows, inputs) = weight.tensor, weight.tensor.shape
    scheme, parts = tensor.scheme, tensor.parts
    y = x.new_empty(len(x), rows)
    launch(
        Call(
            "sign_flip",
            "sign_flip",
            weight.activation,
            (-(-rows // WARPS), len(x), 1),
            THREADS,
            0,
            (
                *(parts["bit_planes"], parts["plane_scales"], parts.get("plane_offsets"), x, y),
                *(rows, inputs, parts["bit_planes"].shape[2], scheme.num_bits),
                scheme.group_size or scheme.grouped_length(tensor.shape),
                scheme.num_groups(tensor.shape),
                int(scheme.group_dim == "in_features"),
            ),
        )
    )
    return y


def dequantize(weight: KernelWeight, launch: Launch) -> Tensor:
    """Return W, (out_features, in_features) in the dtype of the activations."""
    if weight.tiles is None:
        return binary_coding.dequantize(weight.tensor, torch.float32).to(weight.dtype)
    packed, (rows, inputs) = weight.tiles, weight.tensor.shape
    row_tiles, units = packed.planes.shape[:2]
    dense = torch.empty(rows, inputs, dtype=weight.dtype, device=packed.planes.device)
    grid = (-(-row_tiles * units // DEQUANTIZE_WARPS), 1, 1)
    sizes = (rows, inputs, row_tiles, units, packed.scales.shape[1])
    arguments = (packed.planes, packed.scales, dense, *sizes)
    constants = weight.constants
    launch(Call("dequantize", "dequantize", constants, grid, DEQUANTIZE_THREADS, 0, arguments))
    return dense


def rows(index: Tensor, weight: KernelWeight, launch: Launch) -> Tensor:
    """Return the rows that `index` names: (*index.shape, in_features)."""
    if weight.tiles is None or index.numel() == 0:
        return dequantize(weight, launch)[index]
    packed, inputs = weight.tiles, weight.tensor.shape.in_features
    flat = index.flatten().to(torch.int64).contiguous()
    found = torch.empty(len(flat), inputs, dtype=weight.dtype, device=packed.planes.device)
    sizes = (inputs, packed.planes.shape[1], packed.scales.shape[1])
    arguments = (packed.planes, packed.scales, flat, found, *sizes)
    grid, constants = (len(flat), 1, 1), weight.constants
    launch(Call("dequantize", "gather_rows", constants, grid, DEQUANTIZE_THREADS, 0, arguments))
    return found.view(*index.shape, inputs)
