"""Products by the bit-plane kernels: one launch, and one more where inputs are cut into slabs."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.errors import BackendError
from qtool.runtime.backends.cuda import plane_plans, planes, streamed
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.launch import WARP, Card, KernelCall, Launch, constants
from qtool.runtime.backends.cuda.splits import add_splits
from qtool.runtime.backends.cuda.tiles import TILE_ROWS
from qtool.runtime.decode.ops import Norm


class Around(NamedTuple):
    """What a launch does before and after its product."""

    epilogue: str = "none"
    """A key of EPILOGUES."""
    dependent: bool = True
    """It may start, and read its weight, before the launch before it has ended."""
    norm_eps: float | None = None
    """Of the norm of its inputs; None: they are as they are multiplied."""


NOTHING_AROUND = Around()
MOST_NORMED = planes.MOST_LOADS
"""Units of inputs that a warp holds in registers."""


@functools.lru_cache(maxsize=4096)
def call_for(
    sizes: planes.Sizes,
    layout: planes.Layout,
    dtype: torch.dtype,
    card: Card,
    around: Around = NOTHING_AROUND,
) -> KernelCall:
    """Return the launch of a product, decided once for all weights of one shape.

    Raises:
        BackendError: a CTA has too little shared memory.
    """
    _, in_features, batch, row_tiles, units, *_ = sizes
    if stream := streamed.streamed_call(sizes, layout, dtype, card, around.epilogue):
        return stream._replace(dependent=around.dependent)
    shape = (row_tiles, units, batch, layout)
    eps = around.norm_eps
    picked = plane_plans.tuned_plan(*shape, card=card, normed=eps is not None)
    if picked is None:
        raise no_room(card, f"{layout.planes} planes and groups of {layout.group}")
    (tuning, chosen), product = picked, planes.product_for(batch, layout, card)
    loads = -(-product.columns * chosen.units_per_slab // tuning.warps)
    grid = {
        **chosen.macros,
        "COLUMNS": product.columns,
        "WARPS": tuning.warps,
        "ALIGNED": int(in_features % 8 == 0),
        "NORM": 0 if eps is None else normed_units(*shape, card=card),
        "LOADS": min(product.most_loads, loads),
        "EPILOGUE": planes.EPILOGUES[around.epilogue] if chosen.slabs == 1 else 0,
    }
    return KernelCall(
        file=product.name,
        kernel=product.name,
        constants=constants(dtype, **layout.macros, **grid),
        grid=(chosen.ctas * chosen.cluster, chosen.slabs, chosen.column_blocks),
        threads=tuning.warps * WARP,
        shared_bytes=chosen.shared_bytes,
        numbers=(*sizes, chosen.units_per_slab, float(eps or 0)),
        zeros=chosen.exchange_words,
        dependent=around.dependent,
    )


def no_room(card: Card, weight: str) -> BackendError:
    """Return what to say where a CTA can't hold one unit of a weight and its inputs."""
    return BackendError(
        f"A block of this card has {card.shared_bytes} bytes of shared memory: too few for a "
        f"weight of {weight}. QTOOL_KERNEL=dequantize runs it."
    )


def epilogue_of(residual: Tensor | None, *, gated: bool) -> str:
    """Return the key of EPILOGUES of what comes after a product."""
    return "gated" if gated else "none" if residual is None else "residual"


def normed_units(
    row_tiles: int, units: int, batch: int, layout: planes.Layout, *, card: Card
) -> int:
    """Return how many units of x each warp norms in a launch that does so; 0: none can."""
    picked = plane_plans.tuned_plan(row_tiles, units, batch, layout, card=card, normed=True)
    columns = planes.product_for(batch, layout, card).columns
    if picked is None or columns > planes.MOST_IN_PAIRS:
        return 0
    if picked[1].slabs > 1 or picked[1].cluster > 1:
        return 0  # nobody has all inputs
    each = -(-units * columns // picked[0].warps)
    return each if each <= MOST_NORMED else 0


def by_planes(  # noqa: PLR0913 - as `linear_kernels.matmul`
    x: Tensor,
    weight: KernelWeight,
    launch: Launch,
    card: Card,
    *,
    residual: Tensor | None = None,
    gated: bool = False,
    target: planes.Target | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """Return x @ W.T by the tiles: in slabs where the inputs don't fit into shared memory.

    The arguments are those of `linear_kernels.matmul`, and x is aligned; `target` takes the product
    in place of a new tensor, if it isn't gated.
    """
    assert weight.tiles is not None
    (batch, inputs), rows, packed = x.shape, weight.shape.out_features, weight.tiles
    row_tiles, units, *_ = packed.planes.shape
    if target is None:
        target = planes.Target(x.new_empty(batch, rows // 2 if gated else rows), None)
    y, places = target.y, target.places
    sizes = (rows, inputs, batch, row_tiles, units, packed.scales.shape[1], target.width)
    epilogue = epilogue_of(residual, gated=gated)
    gains, eps = norm or (None, None)
    around = Around(epilogue, not weight.fresh, eps)
    call = call_for(sizes, weight.layout, x.dtype, card, around)
    slabs, partial = call.grid[1], None
    if slabs > 1:
        partial = x.new_empty(slabs, batch, row_tiles * TILE_ROWS, dtype=torch.float32)
    launch(call, (packed.planes, packed.scales, x, residual, y, places, partial, gains))
    if partial is not None:
        add_splits(partial, target, launch, epilogue=epilogue, residual=residual)
    return y
