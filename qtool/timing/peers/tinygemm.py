"""The int4 product inside torch."""

import torch
from torch import Tensor

from qtool.timing.peers._peer import (
    GROUP_SIZE,
    Peer,
    PeerWeight,
    affine_codes,
    of_groups,
    stored_size,
)

CODE_OF_ZERO = 8


def tinygemm(weight: Tensor) -> PeerWeight:
    """Use w = (code - 8) * scale + zero, both in bfloat16."""
    codes, steps, low = affine_codes(weight, 4)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    scales, zeros = steps.to(torch.bfloat16), (low + CODE_OF_ZERO * steps).to(torch.bfloat16)
    pairs = torch.stack([scales, zeros], dim=-1).transpose(0, 1).contiguous()
    product = torch.ops.aten._weight_int4pack_mm
    return PeerWeight(
        lambda x: product(x, packed, GROUP_SIZE, pairs),
        stored_size(packed, pairs),
        lambda: of_groups(codes, scales, zeros.float() - CODE_OF_ZERO * scales.float()),
    )


PEERS = (Peer("tinygemm int4 g128", tinygemm, dtype=torch.bfloat16, multiple=GROUP_SIZE),)
