"""Marlin as vLLM has it: 4 bits, symmetric, scales of 128 inputs."""

import torch
from torch import Tensor

from qtool.timing.peers._peer import FLOAT16, GROUP_SIZE, Peer, PeerWeight, symmetric_codes
from qtool.timing.peers._vllm import (
    MARLIN_BITS,
    UINT4_MIDDLE_8,
    packed_inputs,
    symmetric_weight,
    vllm_operators,
)

SCALE_ORDER = [row + 8 * column for row in range(8) for column in range(8)]
"""In which order the kernel reads the scales of 64 outputs."""


def marlin(weight: Tensor) -> PeerWeight:
    """Use `marlin_gemm` on weights that `gptq_marlin_repack` has laid out."""
    library, (rows, inputs) = vllm_operators(), weight.shape
    codes, scales = symmetric_codes(weight, MARLIN_BITS)
    packed = library.gptq_marlin_repack(packed_inputs(codes), inputs, rows, MARLIN_BITS, False)  # noqa: FBT003 - inputs aren't 8 bit
    ordered = scales.T.reshape(-1, len(SCALE_ORDER))[:, SCALE_ORDER].reshape(-1, rows).contiguous()
    blocks = torch.cuda.get_device_properties(weight.device).multi_processor_count
    locks = torch.zeros(4 * blocks, dtype=torch.int32, device=weight.device)

    def product(x: Tensor) -> Tensor:
        return library.marlin_gemm(
            *(x, None, packed, None, ordered, None, None, None, locks, UINT4_MIDDLE_8),
            *(len(x), rows, inputs, False, True, False),  # sums in float32, no atomic additions
        )

    return symmetric_weight(product, (packed, ordered), codes, scales)


PEERS = (Peer("Marlin int4 g128", marlin, FLOAT16, "vllm", multiple=GROUP_SIZE, row_multiple=64),)
