"""The launches of the kernels for groups along out_features, and their arguments."""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.launch import WARP, Card, KernelCall, Launch, constants
from qtool.runtime.backends.cuda.panel_plan import plan_panels
from qtool.runtime.backends.cuda.panels import PanelLayout
from qtool.runtime.backends.cuda.plane_products import NOTHING_AROUND, Around, epilogue_of, no_room
from qtool.runtime.backends.cuda.planes import EPILOGUES, Target
from qtool.runtime.decode.ops import Norm

DEQUANTIZE_THREADS, DEQUANTIZE_WARPS = 128, 4

PanelSizes = tuple[int, int, int, int, int, int, int, int]
"""out_features of a set, in_features, tokens, panels, units, columns of the result, rows of a group
and panels of a group, as the kernels take them."""


@functools.lru_cache(maxsize=4096)
def panel_call(
    sizes: PanelSizes,
    layout: PanelLayout,
    dtype: torch.dtype,
    card: Card,
    around: Around = NOTHING_AROUND,
) -> KernelCall:
    """Return the launch of a product, decided once for all weights of one shape.

    Raises:
        BackendError: a CTA has too little shared memory.
    """
    _, in_features, batch, panels, units, *_ = sizes
    chosen = plan_panels(panels, units, batch, layout, card=card)
    if chosen is None:
        raise no_room(card, f"{layout.planes} planes in panels of {layout.tiles} tiles")
    grid = {
        "COLUMNS": chosen.product.columns,
        "WARPS": chosen.warps,
        "STAGES": chosen.stages,
        "BLOCKS": chosen.per_multiprocessor,
        "ALIGNED": int(in_features % 8 == 0),
        "WHOLE": int(chosen.whole),
        "CHUNK": chosen.chunk,
        "NORM": int(around.norm_eps is not None),
        "EPILOGUE": EPILOGUES[around.epilogue],
    }
    return KernelCall(
        file=chosen.product.name,
        kernel=chosen.product.name,
        constants=constants(dtype, **layout.macros, **grid),
        grid=(chosen.ctas, -(-batch // chosen.product.columns), 1),
        threads=chosen.warps * WARP,
        shared_bytes=chosen.shared_bytes,
        numbers=(*sizes, float(around.norm_eps or 0)),
        dependent=around.dependent,
        zeros=chosen.exchange_words,
    )


def panel_kernel(weight: KernelWeight, tokens: int, card: Card) -> str:
    """Return the name of the kernel that multiplies so many tokens, few enough for planes."""
    assert weight.panels is not None
    panels, units = weight.panels.planes.shape[:2]
    planned = plan_panels(panels, units, tokens or 1, weight.panel_layout, card=card)
    return "dequantize" if planned is None else "planes"


def by_panels(  # noqa: PLR0913 - as `linear_kernels.matmul`
    x: Tensor,
    weight: KernelWeight,
    launch: Launch,
    card: Card,
    *,
    residual: Tensor | None = None,
    gated: bool = False,
    target: Target | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """Do `linear_kernels.matmul` by planes; x is aligned to 16 bytes. `target` has no places.

    Raises:
        BackendError: a CTA has too little shared memory.
    """
    packed, rows = weight.panels, weight.shape.out_features
    assert packed is not None
    outputs = rows // packed.sets
    target = target or Target(x.new_empty(len(x), outputs))
    panels, units = packed.planes.shape[:2]
    sizes = (outputs, x.shape[1], len(x), panels, units, target.width)
    cut = (packed.group_rows, packed.of_group)
    gains, eps = norm or (None, None)
    around = Around(epilogue_of(residual, gated=gated), not weight.fresh, eps)
    call = panel_call((*sizes, *cut), weight.panel_layout, x.dtype, card, around)
    launch(call, (packed.planes, packed.scales, x, residual, target.y, gains))
    return target.y


def by_dense_panels(
    x: Tensor,
    weight: KernelWeight,
    launch: Launch,
    card: Card,
    *,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """Do `linear_kernels.matmul` by a dequantized weight and torch's product."""
    del card
    y = functional.linear(x, dense_panels(weight, launch))
    if gated:
        gate, up = y.chunk(2, dim=-1)
        return functional.silu(gate) * up
    return y if residual is None else y + residual


def dense_panels(weight: KernelWeight, launch: Launch) -> Tensor:
    """Return W, (out_features, in_features) in the dtype of the activations.

    Of gate and up, all rows of gate come first.
    """
    packed, (rows, inputs) = weight.panels, weight.shape
    assert packed is not None
    panels, units, sets, count = packed.planes.shape[:4]
    dense = torch.empty(rows, inputs, dtype=weight.dtype, device=packed.planes.device)
    sizes = (rows // sets, inputs, panels, units, packed.group_rows, packed.of_group)
    blocks = -(-panels * units * sets * count // DEQUANTIZE_WARPS)
    call = _dense_call("panel_dequantize", sizes, blocks, weight.panel_layout, weight.dtype)
    tensors = (packed.planes, packed.scales, dense)
    launch(call._replace(dependent=False) if weight.fresh else call, tensors)
    return dense


def rows_of_panels(index: Tensor, weight: KernelWeight, launch: Launch) -> Tensor:
    """Return the rows that `index` names: (*index.shape, in_features); NaN where there is none."""
    packed, (rows, inputs) = weight.panels, weight.shape
    assert packed is not None
    flat = index.flatten().to(torch.int64).contiguous()
    found = torch.empty(len(flat), inputs, dtype=weight.dtype, device=flat.device)
    sizes = (rows, inputs, packed.planes.shape[1], packed.group_rows, packed.of_group)
    call = _dense_call("panel_rows", sizes, len(flat), weight.panel_layout, weight.dtype)
    if len(flat):
        launch(call, (packed.planes, packed.scales, flat, found))
    return found.view(*index.shape, inputs)


@functools.lru_cache(1024)  # not all lengths of prompts for ever
def _dense_call(
    kernel: str, sizes: tuple[int, ...], blocks: int, layout: PanelLayout, dtype: torch.dtype
) -> KernelCall:
    macros, grid = constants(dtype, **layout.macros), (blocks, 1, 1)
    return KernelCall("panel_dequantize", kernel, macros, grid, DEQUANTIZE_THREADS, 0, sizes)
