"""bitsandbytes: 4 bits of a fixed code, and a float32 scale for each block of 64 weights."""

from functools import partial

from torch import Tensor

from qtool.timing.peers._peer import FLOAT16, Peer, PeerWeight, stored_size

NF4_BLOCK = 64


def bitsandbytes(weight: Tensor, code: str) -> PeerWeight:
    """Use one of its codes, nf4 or fp4."""
    import bitsandbytes as library

    packed, state = library.functional.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type=code)
    product, stored = library.matmul_4bit, stored_size(packed, state.absmax)
    return PeerWeight(
        lambda x: product(x, packed.t(), quant_state=state),
        stored,
        lambda: library.functional.dequantize_4bit(packed, state),
    )


PEERS = tuple(
    Peer(
        f"bitsandbytes {code}",
        partial(bitsandbytes, code=code),
        FLOAT16,
        "bitsandbytes",
        multiple=NF4_BLOCK,
    )
    for code in ("nf4", "fp4")
)
