"""GemLite: Triton kernels."""

from functools import partial

from torch import Tensor

from qtool.timing.peers._peer import (
    FLOAT16,
    GROUP_SIZE,
    Peer,
    PeerWeight,
    affine_codes,
    of_groups,
    stored_size,
)


def gemlite(weight: Tensor, num_bits: int) -> PeerWeight:
    """Use w = (code - zero) * scale."""
    from gemlite.helper import A16Wn

    codes, steps, low = affine_codes(weight, num_bits)
    zeros = -low / steps
    made = A16Wn(device=str(weight.device)).from_weights(
        codes.clone(), steps, zeros, W_nbits=num_bits, group_size=GROUP_SIZE
    )
    packed_bytes = codes.numel() * num_bits // 8
    return PeerWeight(
        made,
        packed_bytes + stored_size(steps, zeros),
        lambda: of_groups(codes, steps, -zeros.float() * steps.float()),
    )


PEERS = tuple(
    Peer(
        f"GemLite {bits} bit g128",
        partial(gemlite, num_bits=bits),
        FLOAT16,
        "gemlite",
        multiple=GROUP_SIZE,
    )
    for bits in (4, 2)
)
