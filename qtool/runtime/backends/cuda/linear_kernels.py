"""Which kernel runs a weight, on which grid, with which arguments.

What launches is passed in, so all but the launch itself is tested without a card:
tests/kernels/host.py launches the same text on a CPU.
"""

import functools

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.core.layout import side_by_side
from qtool.errors import BackendError
from qtool.runtime.backends.cuda import lut, panel_linear, panel_plan, planes, tiles, wide
from qtool.runtime.backends.cuda.centers import CENTERS, is_tileable, planes_of
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.launch import LOAD_BYTES, Card, KernelCall, Launch, constants
from qtool.runtime.backends.cuda.panels import is_panelable, pack_panels
from qtool.runtime.backends.cuda.plane_plans import tuned_plan
from qtool.runtime.backends.cuda.plane_products import by_planes, epilogue_of, normed_units
from qtool.runtime.backends.cuda.selection import (
    STORED_KERNELS,
    WideTuning,
    selection_for,
    wanted_kernel,
)
from qtool.runtime.backends.cuda.tiles import TILE_ROWS
from qtool.runtime.decode.ops import Norm

SIGN_FLIP_THREADS, SIGN_FLIP_ROWS = 256, 8


def prepare(
    tensor: QuantizedTensor, dtype: torch.dtype, *, keep_stored: bool | None = None
) -> KernelWeight:
    """Re-lay a weight of a format that `planes_of` makes planes of.

    Args:
        tensor: The weight, on the device that runs it.
        dtype: Of the activations.
        keep_stored: Hold on to the stored parts, which the kernel `lut` reads; None: where that one
            is asked for, or is the fastest.
    """
    tensor = planes_of(tensor)
    if keep_stored is None:
        wanted, device = wanted_kernel(), tensor.parts["bit_planes"].device
        card_name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        keep_stored = wanted in STORED_KERNELS if wanted else suits_tables(tensor, card_name)
    tiled, paneled = is_tileable(tensor), is_panelable(tensor)
    return KernelWeight(
        scheme=tensor.scheme,
        shape=tensor.shape,
        dtype=dtype,
        tiles=tiles.pack(tensor) if tiled else None,
        stored=tensor if keep_stored or not (tiled or paneled) else None,
        centered=CENTERS in tensor.parts,
        panels=pack_panels(tensor) if paneled else None,
    )


def suits_tables(tensor: QuantizedTensor, card_name: str) -> bool:
    """Return whether the kernel `lut` is the fastest for one token."""
    suits = selection_for(card_name).prefers_tables(tensor.scheme.num_bits, tensor.shape)
    return suits and lut.why_no_tables(tensor) is None


def kernel_for(weight: KernelWeight, tokens: int, card: Card, *, gated: bool = False) -> str:
    """Return the name of the kernel that multiplies so many tokens; `lut` knows no gate."""
    wanted = wanted_kernel()
    if wanted is not None:
        return wanted
    shape, num_bits = weight.shape, weight.scheme.num_bits
    weights = shape.out_features * shape.in_features
    selection, equal_steps = selection_for(card.name), weight.centered
    is_wide = selection.is_wide(num_bits, tokens, shape, equal_steps=equal_steps)
    if is_wide and wide_tuning(weight, tokens, card):
        return "wide"
    if tokens > selection.most_tokens(num_bits, weights, equal_steps=equal_steps):
        return "dequantize"
    if weight.tiles is None:
        return "sign_flip" if not weight.panels else panel_linear.panel_kernel(weight, tokens, card)
    if tokens == 1 and not gated and weight.stored and suits_tables(weight.stored, card.name):
        return "lut"
    row_tiles, units, *_ = weight.tiles.planes.shape
    room = tuned_plan(row_tiles, units, tokens or 1, weight.layout, card=card)
    return "dequantize" if room is None else "planes"


def can_norm(weight: KernelWeight, tokens: int, card: Card, *, gated: bool = False) -> bool:
    """Return whether `matmul` of so many tokens can norm them itself."""
    if tokens == 0 or kernel_for(weight, tokens, card, gated=gated) != "planes":
        return False
    if weight.tiles is None:
        return weight.panels is not None and tokens <= panel_plan.MOST_AS_BYTES
    row_tiles, units, *_ = weight.tiles.planes.shape
    return normed_units(row_tiles, units, tokens, weight.layout, card=card) > 0


def wide_tuning(weight: KernelWeight, tokens: int, card: Card) -> WideTuning | None:
    """Return how bit_plane_wgmma.cu multiplies so many tokens; None: it can't."""
    if weight.tiles is None or tokens == 0:
        return None
    (row_tiles, units, *_), layout = weight.tiles.planes.shape, weight.layout
    return wide.tuned_wide(tokens, row_tiles * TILE_ROWS, units, layout, card)


def matmul(  # noqa: PLR0913 - what, by what, where, and what comes after
    x: Tensor,
    weight: KernelWeight,
    launch: Launch,
    card: Card,
    *,
    kernel: str | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    norm: Norm | None = None,
) -> Tensor:
    """Return x @ W.T.

    Args:
        x: (tokens, in_features) float16 or bfloat16, contiguous.
        weight: W.
        launch: Runs a kernel.
        card: Where.
        kernel: One of KERNELS; None: `kernel_for`.
        residual: (tokens, out_features), added to the product.
        gated: Rows of W alternate, see `fusing`: return silu(gate) * up.
        norm: Of x, done by the launch; only where `can_norm`.

    Returns:
        (tokens, out_features) in the dtype of `x`; half as wide if gated.

    Raises:
        BackendError: the kernel asked for can't run this weight.
    """
    tokens = x.shape[0]
    kernel = kernel or kernel_for(weight, tokens, card, gated=gated)
    if x.data_ptr() % LOAD_BYTES != 0:  # a slice of something
        x = x.clone()
    if weight.panels is not None and tokens > 0 and kernel in ("planes", "dequantize"):
        run = panel_linear.by_dense_panels
        if kernel == "planes":
            run = functools.partial(panel_linear.by_panels, norm=norm)
        return run(x, weight, launch, card, residual=residual, gated=gated)
    if kernel == "planes" and weight.tiles is not None and tokens > 0:
        return by_planes(x, weight, launch, card, residual=residual, gated=gated, norm=norm)
    if kernel == "wide" and tokens > 0:
        return by_wide(x, weight, launch, card, residual=residual, gated=gated)
    if kernel == "lut" and tokens > 0:
        y = lut.multiply_by_tables(x, _stored(weight, kernel), launch, card, residual)
        residual = None
    else:
        y = _plain(x, weight, launch, kernel)
    if gated:
        gate, up = side_by_side(y).chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    return y if residual is None else y + residual


def matmul_into(
    y: Tensor, x: Tensor, weight: KernelWeight, launch: Launch, card: Card, norm: Norm | None
) -> None:
    """Do `matmul` and write to `y`, (tokens, out_features), which may be columns of a wider one."""
    target, kernel = planes.Target(y), kernel_for(weight, len(x), card)
    if kernel != "planes" or len(x) == 0 or x.data_ptr() % LOAD_BYTES != 0:
        y.copy_(matmul(x, weight, launch, card, norm=norm))
    elif weight.panels is not None:
        panel_linear.by_panels(x, weight, launch, card, target=target, norm=norm)
    else:
        by_planes(x, weight, launch, card, target=target, norm=norm)


def by_wide(  # noqa: PLR0913 - as `matmul`
    x: Tensor,
    weight: KernelWeight,
    launch: Launch,
    card: Card,
    *,
    residual: Tensor | None = None,
    gated: bool = False,
    target: planes.Target | None = None,
) -> Tensor:
    """Do `matmul` of many tokens by warpgroups; the arguments are those of `by_planes`.

    Raises:
        BackendError: the card or the weight isn't one for this kernel.
    """
    tuning = wide_tuning(weight, len(x), card)
    if tuning is None or weight.tiles is None:
        raise BackendError(
            f"Kernel 'wide' needs compute capability 9.0 and a weight in tiles ({weight.scheme}); "
            "dequantize multiplies many tokens anywhere."
        )
    rows = weight.shape.out_features // (2 if gated else 1)
    target = target or planes.Target(x.new_empty(len(x), rows))
    wide.multiply_wide(
        *(x, weight.tiles, weight.shape, weight.layout, launch, card),
        tuning=tuning,
        target=target,
        epilogue=epilogue_of(residual, gated=gated),
        residual=residual,
        dependent=not weight.fresh,
    )
    return target.y


def _plain(x: Tensor, weight: KernelWeight, launch: Launch, kernel: str) -> Tensor:
    if len(x) == 0:
        return x.new_empty(0, weight.shape.out_features)
    if kernel == "dequantize":
        return torch.nn.functional.linear(x, dense_weight(weight, launch))
    if kernel != "sign_flip":
        raise BackendError(
            f"Kernel {kernel!r} can't run this weight ({weight.scheme}); dequantize and sign_flip "
            "can."
        )
    return _by_definition(x, _stored(weight, kernel), launch)


def _stored(weight: KernelWeight, kernel: str) -> QuantizedTensor:
    """Return the stored parts for a kernel that reads them.

    Raises:
        BackendError: they weren't kept, or the kernel can't read them.
    """
    if weight.stored is None:
        raise BackendError(
            f"Kernel {kernel!r} reads a weight as it is stored, and prepare wasn't told to keep "
            "that (keep_stored)."
        )
    reason = lut.why_no_tables(weight.stored) if kernel == "lut" else None
    if reason is not None:
        raise BackendError(reason)
    return weight.stored


def _by_definition(x: Tensor, tensor: QuantizedTensor, launch: Launch) -> Tensor:
    (rows, inputs), scheme, parts = tensor.shape, tensor.scheme, tensor.parts
    y, offsets = x.new_empty(len(x), rows), parts.get("plane_offsets", parts.get(CENTERS))
    numbers = (
        *(rows, inputs, parts["bit_planes"].shape[2], scheme.num_bits),
        scheme.group_size or scheme.grouped_length(tensor.shape),
        scheme.num_groups(tensor.shape),
        int(CENTERS in parts),
        int(scheme.group_dim == "in_features"),
    )
    grid, threads = (-(-rows // SIGN_FLIP_ROWS), len(x), 1), SIGN_FLIP_THREADS
    call = KernelCall("sign_flip", "sign_flip", constants(x.dtype), grid, threads, 0, numbers)
    launch(call, (parts["bit_planes"], parts["plane_scales"], offsets, x, y))
    return y


@functools.lru_cache(1024)  # not all lengths of prompts for ever
def dequantize_call(
    kernel: str, sizes: tuple[int, ...], blocks: int, layout: planes.Layout, dtype: torch.dtype
) -> KernelCall:
    """Return a launch of kernels/dequantize.cu, made once for all weights of one shape."""
    macros, grid = constants(dtype, **layout.macros), (blocks, 1, 1)
    return KernelCall("dequantize", kernel, macros, grid, panel_linear.DEQUANTIZE_THREADS, 0, sizes)


def dense_weight(weight: KernelWeight, launch: Launch) -> Tensor:
    """Return W, (out_features, in_features) in the dtype of the activations."""
    if weight.panels is not None:
        return panel_linear.dense_panels(weight, launch)
    if weight.tiles is None:
        return weight.dense()
    packed, (rows, inputs) = weight.tiles, weight.shape
    row_tiles, units, *_ = packed.planes.shape
    dense = torch.empty(rows, inputs, dtype=weight.dtype, device=packed.planes.device)
    sizes = (rows, inputs, row_tiles, units, packed.scales.shape[1])
    blocks = -(-row_tiles * units // panel_linear.DEQUANTIZE_WARPS)
    call = dequantize_call("dequantize", sizes, blocks, weight.layout, weight.dtype)
    tensors = (packed.planes, packed.scales, dense)
    launch(call._replace(dependent=False) if weight.fresh else call, tensors)
    return dense


def rows(index: Tensor, weight: KernelWeight, launch: Launch) -> Tensor:
    """Return the rows that `index` names: (*index.shape, in_features)."""
    inputs = weight.shape.in_features
    if weight.panels is not None:
        return panel_linear.rows_of_panels(index, weight, launch)
    if weight.tiles is None:
        return dense_weight(weight, launch)[index]
    if index.numel() == 0:
        return torch.empty(*index.shape, inputs, dtype=weight.dtype, device=index.device)
    packed = weight.tiles
    flat = index.flatten().to(torch.int64).contiguous()
    found = torch.empty(len(flat), inputs, dtype=weight.dtype, device=flat.device)
    rows, units, groups = weight.shape.out_features, packed.planes.shape[1], packed.scales.shape[1]
    sizes = (rows, inputs, units, groups, 0, rows)
    call = dequantize_call("gather_rows", sizes, len(flat), weight.layout, weight.dtype)
    launch(call, (packed.planes, packed.scales, flat, None, found))
    return found.view(*index.shape, inputs)
