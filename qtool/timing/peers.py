"""Other kernels, timed beside ours in the same run: cuBLAS in float16 and packed 4-bit products.

Each takes a dense weight, quantizes it in its own way, and multiplies as its library does.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qtool.runtime.backends.cuda.launch import OLDEST

GROUP_SIZE, FLOAT16 = 128, torch.float16


@dataclass(frozen=True, slots=True)
class PeerWeight:
    """A weight as a peer keeps it."""

    matmul: Callable[[Tensor], object]
    num_bytes: int
    """Packed weights, scales and zero points."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A kernel of another library."""

    name: str
    build: Callable[[Tensor], PeerWeight]
    """Takes a dense float16 weight, (out_features, in_features)."""
    dtype: torch.dtype = FLOAT16
    """Of the activations."""
    module: str = "torch"
    """pip installs it by this name."""
    multiple: int = 1
    """in_features must be one of it."""

    def why_not(self, device: torch.device) -> str | None:
        """Return None if it can be timed on a device, else what is missing."""
        if importlib.util.find_spec(self.module) is None:
            return f"isn't installed: pip install {self.module}"
        if device.type != "cuda":
            return "needs a CUDA card"
        if torch.cuda.get_device_capability(device) < OLDEST:
            return "needs a card of compute capability 8.0 or newer"
        return None


def _affine(weight: Tensor, num_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, and steps and minima of each group: the peers differ in how they pack them."""
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    low, high = groups.aminmax(dim=-1)
    steps = ((high - low) / (2**num_bits - 1)).clamp_(min=1e-6)
    codes = (groups - low.unsqueeze(-1)).div_(steps.unsqueeze(-1)).round_().to(torch.uint8)
    return codes.clamp_(max=2**num_bits - 1).flatten(1), steps, low


def tinygemm(weight: Tensor) -> PeerWeight:
    """Use the int4 product inside torch: w = (code - 8) * scale + zero."""
    codes, steps, low = _affine(weight, 4)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    pairs = torch.stack([steps, low + 8 * steps], dim=-1)  # (out_features, groups, 2)
    pairs = pairs.transpose(0, 1).to(torch.bfloat16).contiguous()
    product = torch.ops.aten._weight_int4pack_mm
    return PeerWeight(lambda x: product(x, packed, GROUP_SIZE, pairs), _bytes(packed, pairs))


def torchao(weight: Tensor) -> PeerWeight:
    """Use the tensor subclass that `quantize_` puts in place of a linear's weight."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    rows, inputs = weight.shape
    linear = torch.nn.Linear(inputs, rows, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    config = Int4WeightOnlyConfig(
        group_size=GROUP_SIZE, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )
    quantize_(linear, config)
    stored: Any = linear.weight
    return PeerWeight(linear, _bytes(stored.qdata, stored.scale_and_zero))


def gemlite(weight: Tensor, num_bits: int) -> PeerWeight:
    """Use the Triton kernels of GemLite: w = (code - zero) * scale."""
    from gemlite.helper import A16Wn

    codes, steps, low = _affine(weight, num_bits)
    zeros = -low / steps
    made = A16Wn(device=str(weight.device)).from_weights(
        codes, steps, zeros, W_nbits=num_bits, group_size=GROUP_SIZE
    )
    packed_bytes = codes.numel() * num_bits // 8
    return PeerWeight(made, packed_bytes + _bytes(steps, zeros))


def bitsandbytes(weight: Tensor, code: str) -> PeerWeight:
    """Use 4 bits of a fixed code, and a float32 scale for each block of 64 weights."""
    import bitsandbytes as library

    packed, state = library.functional.quantize_4bit(weight, blocksize=64, quant_type=code)
    product, stored = library.matmul_4bit, _bytes(packed, state.absmax)
    return PeerWeight(lambda x: product(x, packed.t(), quant_state=state), stored)


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


CUBLAS = "fp16 cuBLAS"
IN_TORCH = (Peer("tinygemm int4 g128", tinygemm, dtype=torch.bfloat16, multiple=GROUP_SIZE),)
OTHER_LIBRARIES = (
    Peer("torchao int4 g128", torchao, torch.bfloat16, "torchao", GROUP_SIZE),
    Peer("GemLite 4 bit g128", partial(gemlite, num_bits=4), FLOAT16, "gemlite", GROUP_SIZE),
    Peer("GemLite 2 bit g128", partial(gemlite, num_bits=2), FLOAT16, "gemlite", GROUP_SIZE),
    Peer("bitsandbytes nf4", partial(bitsandbytes, code="nf4"), FLOAT16, "bitsandbytes", 64),
    Peer("bitsandbytes fp4", partial(bitsandbytes, code="fp4"), FLOAT16, "bitsandbytes", 64),
)
