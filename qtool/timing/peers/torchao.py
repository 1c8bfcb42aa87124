"""torchao: the tensor subclass that `quantize_` puts in place of a linear's weight."""

from typing import Any

import torch
from torch import Tensor

from qtool.timing.peers._peer import GROUP_SIZE, Peer, PeerWeight, stored_size


def torchao(weight: Tensor) -> PeerWeight:
    """Use its int4 weights, packed in tiles."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    rows, inputs = weight.shape
    linear = torch.nn.Linear(inputs, rows, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    config = Int4WeightOnlyConfig(
        group_size=GROUP_SIZE, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )
    quantize_(linear, config)
    stored: Any = linear.weight
    return PeerWeight(linear, stored_size(stored.qdata, stored.scale_and_zero))


PEERS = (Peer("torchao int4 g128", torchao, torch.bfloat16, "torchao", multiple=GROUP_SIZE),)
