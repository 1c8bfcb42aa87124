"""Products of tokens with the weights of the experts that were chosen for them, in one launch.

The weights of all experts are one, tiles of one below those of another; which tiles a token meets
is read on the card, so that a graph holds it.
"""

import functools

import torch
from torch import Tensor

from qtool.runtime.backends.cuda import plane_products, planes
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.launch import LOAD_BYTES, Card, KernelCall, Launch
from qtool.runtime.backends.cuda.splits import add_splits
from qtool.runtime.backends.cuda.tiles import TILE_ROWS
from qtool.runtime.decode import torch_ops
from qtool.runtime.decode.ops import DecodeOps
from qtool.runtime.decode.weights import DecoderExperts

MOST_SLOTS = 64
"""Tokens times experts of each, beyond which experts run one after the other: each reads its weight
once for all its tokens, and the host has time."""


def are_tiled(experts: DecoderExperts) -> bool:
    """Return whether the weights of all experts are one for the kernels, cut between tiles."""
    count = len(experts.gate_up)
    return all(
        isinstance(whole, KernelWeight)
        and whole.tiles is not None
        and whole.shape.out_features % (count * TILE_ROWS) == 0
        for whole in (experts.all_gate_up, experts.all_down)
    )


def can_capture(experts: DecoderExperts) -> bool:
    """Return whether a graph can hold these experts: the host needn't read who is chosen."""
    dense = isinstance(experts.all_gate_up, Tensor) and isinstance(experts.all_down, Tensor)
    return dense or are_tiled(experts)


def run_experts(
    x: Tensor, experts: DecoderExperts, ops: DecodeOps, launch: Launch, card: Card
) -> Tensor:
    """Return what the chosen experts of each token say, weighed and summed.

    Args:
        x: (tokens, hidden) float16 or bfloat16.
        experts: `are_tiled`.
        ops: Run an expert by itself.
        launch: Runs a kernel.
        card: Where.
    """
    index, weights = torch_ops.routed(x, experts)
    first, last = experts.all_gate_up, experts.all_down
    assert isinstance(first, KernelWeight) and isinstance(last, KernelWeight)
    if index.numel() > MOST_SLOTS and not torch_ops.is_captured(x):
        said = torch_ops.one_by_one(ops, x, index, experts)
    else:
        count, chosen = len(experts.gate_up), index.flatten().int()
        inputs = x.repeat_interleave(index.shape[-1], 0)
        y = multiply_chosen(inputs, first, chosen, count, launch, card)
        y = multiply_chosen(torch_ops.silu_times(y), last, chosen, count, launch, card)
        said = y.view(*index.shape, -1)
    return torch_ops.weighed(said, weights, x.dtype)


def multiply_chosen(
    x: Tensor, weight: KernelWeight, chosen: Tensor, count: int, launch: Launch, card: Card
) -> Tensor:
    """Return each token times the weight of its expert.

    Args:
        x: (slots, in_features), contiguous.
        weight: Of `count` experts, one below the other.
        chosen: (slots,) int32 expert of each.
        count: Of experts.
        launch: Runs a kernel.
        card: Where.

    Returns:
        (slots, out_features of an expert) in the dtype of `x`.
    """
    assert weight.tiles is not None
    packed, slots, rows = weight.tiles, len(x), weight.shape.out_features // count
    if x.data_ptr() % LOAD_BYTES != 0:
        x = x.clone()
    row_tiles, units = packed.planes.shape[0] // count, packed.planes.shape[1]
    y = x.new_empty(slots, rows)
    sizes = (rows, weight.shape.in_features, slots, row_tiles, units, packed.scales.shape[1], rows)
    call = chosen_call(sizes, weight.layout, x.dtype, card)
    slabs, partial = call.grid[1], None
    if slabs > 1:
        partial = x.new_empty(slabs, slots, row_tiles * TILE_ROWS, dtype=torch.float32)
    launch(call, (packed.planes, packed.scales, chosen, x, y, partial))
    if partial is not None:
        add_splits(partial, planes.Target(y), launch)
    return y


@functools.lru_cache(maxsize=4096)
def chosen_call(
    sizes: planes.Sizes, layout: planes.Layout, dtype: torch.dtype, card: Card
) -> KernelCall:
    """Return the launch: for each slot that of one token, on its share of the card.

    Raises:
        BackendError: a CTA has too little shared memory.
    """
    rows, inputs, slots, *others = sizes
    each = max(1, card.multiprocessors // max(slots, 1))
    share = card._replace(multiprocessors=each, counts_bits=False)  # planes as bytes
    one = plane_products.call_for((rows, inputs, 1, *others), layout, dtype, share)
    name = f"{one.file}_experts"
    return one._replace(
        file=name,
        kernel=name,
        grid=(*one.grid[:2], slots),
        numbers=(*sizes, one.numbers[len(sizes)]),  # and units per slab, but no norm's eps
        zeros=one.zeros * slots,
    )
