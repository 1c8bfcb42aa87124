"""Humming: kernels compiled where they run, for weights of 1 to 8 bits."""

from functools import partial
from typing import Any

from torch import Tensor

from qtool.timing.peers._peer import FLOAT16, GROUP_SIZE, Peer, PeerWeight, stored_size

PARTS = ("weight", "weight_scale")


def humming(weight: Tensor, num_bits: int) -> PeerWeight:
    """Use its linear, symmetric, with scales of 128 inputs."""
    from humming.layer import HummingLayer

    rows, inputs = weight.shape
    kind = {"dtype": f"int{num_bits}", "group_size": GROUP_SIZE}
    layer: Any = HummingLayer(
        shape_n=rows, shape_k=inputs, weight_config=kind, torch_dtype=FLOAT16
    ).to(weight.device)
    layer.load_from_unquantized(weight)
    schema, stored = layer.weight_schema, {name: getattr(layer, name).clone() for name in PARTS}
    layer.transform()  # re-lays both
    return PeerWeight(
        layer,
        stored_size(*(getattr(layer, name) for name in PARTS)),
        lambda: schema.dequant_tensors(stored),
    )


PEERS = tuple(
    Peer(
        f"Humming {bits} bit g128",
        partial(humming, num_bits=bits),
        FLOAT16,
        "humming",
        package="humming-kernels",
        multiple=GROUP_SIZE,
        row_multiple=64,
    )
    for bits in (4, 3, 2)
)
