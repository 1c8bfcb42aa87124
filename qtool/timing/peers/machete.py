"""Machete, vLLM's kernel for compute capability 9.0: 4 bits, symmetric, scales of 128 inputs."""

from torch import Tensor

from qtool.timing.peers._peer import FLOAT16, GROUP_SIZE, Peer, PeerWeight, symmetric_codes
from qtool.timing.peers._vllm import (
    MARLIN_BITS,
    UINT4_MIDDLE_8,
    packed_inputs,
    symmetric_weight,
    vllm_operators,
)


def machete(weight: Tensor) -> PeerWeight:
    """Use `machete_mm`, which chooses its own schedule."""
    library = vllm_operators()
    codes, scales = symmetric_codes(weight, MARLIN_BITS)
    words = packed_inputs(codes).t().contiguous().t()  # it reads columns
    packed = library.machete_prepack_B(words, FLOAT16, UINT4_MIDDLE_8, FLOAT16)
    by_group = scales.T.contiguous()

    def product(x: Tensor) -> Tensor:
        return library.machete_mm(
            *(x, packed, UINT4_MIDDLE_8, None, by_group, None, GROUP_SIZE, None, None, None)
        )

    return symmetric_weight(product, (packed, by_group), codes, scales)


PEERS = (
    Peer(
        "Machete int4 g128",
        machete,
        FLOAT16,
        "vllm",
        multiple=GROUP_SIZE,
        row_multiple=128,
        only=(9, 0),
    ),
)
