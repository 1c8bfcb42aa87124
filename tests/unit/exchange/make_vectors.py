"""Writes vectors.safetensors: layers packed and decoded by the peers' own libraries.

Made with gptqmodel 7.7.0 and compressed-tensors 0.20.1 by `python -m
tests.unit.exchange.make_vectors` where both are installed. Layers are 32 x 64; of each there are
the tensors as a checkpoint has them, and `decoded`, the weight in float32.
"""

import math
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file
from torch import Tensor, nn

FILE = Path(__file__).with_name("vectors.safetensors")
OUTPUTS, INPUTS, GROUP = 32, 64, 16
GROUPS = math.ceil(INPUTS / GROUP)


def drawn(bits: int, lowest: int) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """Return a linear on a grid, its scales, its zero points, and codes."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (OUTPUTS, INPUTS), generator=generator)
    scales = (torch.randint(1, 500, (OUTPUTS, GROUPS), generator=generator) / 4096).half().float()
    zeros = torch.randint(lowest, 2**bits, (OUTPUTS, GROUPS), generator=generator).float()
    return nn.Linear(INPUTS, OUTPUTS, bias=False), scales, zeros, codes


def gptq(bits: int, version: int) -> dict[str, Tensor]:
    linear, scales, zeros, codes = drawn(bits, 1)
    order = torch.randperm(INPUTS, generator=torch.Generator().manual_seed(7))
    g_idx = torch.empty(INPUTS, dtype=torch.int32)
    g_idx[order] = (torch.arange(INPUTS) // GROUP).int()
    where = g_idx.long()
    linear.weight.data = (codes - zeros[:, where]) * scales[:, where]
    made: Any = TorchLinear(
        bits=bits,
        group_size=GROUP,
        sym=False,
        desc_act=True,
        in_features=INPUTS,
        out_features=OUTPUTS,
        bias=False,
    )
    made.pack_original(linear, scales, zeros, g_idx)
    second = made.qzeros.clone()
    if version == 1:
        config = type("Config", (), {"bits": bits, "pack_dtype": torch.int32})
        convert_gptq_v2_to_v1_format_module(made, config)
    parts = {n: getattr(made, n).clone() for n in ("qweight", "qzeros", "scales", "g_idx")}
    made.qzeros, made.scales = second, made.scales.float()
    return {**parts, "decoded": made.dequantize_weight().T.float().contiguous()}


def awq() -> dict[str, Tensor]:
    linear, scales, zeros, codes = drawn(4, 0)
    linear.weight.data = (codes - zeros.repeat_interleave(GROUP, 1)) * scales.repeat_interleave(
        GROUP, 1
    )
    made: Any = AwqTorchLinear(
        bits=4,
        group_size=GROUP,
        sym=False,
        desc_act=False,
        in_features=INPUTS,
        out_features=OUTPUTS,
        bias=False,
        register_buffers=True,
    )
    made.pack(linear, scales, zeros)
    decoded = dequantize_gemm(made.qweight, made.qzeros, made.scales.float(), 4, GROUP)
    parts = {n: getattr(made, n).clone() for n in ("qweight", "qzeros", "scales")}
    return {**parts, "decoded": decoded.T.float().contiguous()}


def compressed(bits: int, *, symmetric: bool) -> dict[str, Tensor]:
    _, scales, zeros, codes = drawn(bits, 0)
    half = 2 ** (bits - 1)
    zeros = (zeros - half).to(torch.int8)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=bits, symmetric=symmetric, strategy="group", group_size=GROUP
        ),
    )
    spread = scales.repeat_interleave(GROUP, 1)
    centers = 0 if symmetric else zeros.repeat_interleave(GROUP, 1).float()
    state = {"weight": (codes - half - centers) * spread, "weight_scale": scales}
    if not symmetric:
        state["weight_zero_point"] = zeros
    packed = PackedQuantizationCompressor.compress(state, scheme)
    decoded = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    return {**packed, "weight_scale": scales.half(), "decoded": decoded.float()}


def main() -> None:
    """Write the file."""
    cases = {f"gptq-{bits}-v{v}": gptq(bits, v) for bits in (2, 3, 4, 8) for v in (1, 2)}
    cases["awq-4"] = awq()
    for bits in (3, 4, 5, 8):
        cases[f"ct-{bits}"] = compressed(bits, symmetric=False)
        cases[f"ct-{bits}-sym"] = compressed(bits, symmetric=True)
    tensors = {
        f"{case}.{n}": v.contiguous() for case, parts in cases.items() for n, v in parts.items()
    }
    save_file(tensors, FILE)


if __name__ == "__main__":
    main()
