"""Read the experts of a block of Mixtral's or Qwen3-MoE's kind."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from qtool.base import ModelPart
from qtool.checkpoint.adapter import RANK_UP
from qtool.core.experts import SeparateExperts
from qtool.runtime.decode.weights import DecoderExperts, Projection
from qtool.runtime.modules import QuantizedLinear

OF_EXPERTS = ("mixtral", "qwen3_moe")
"""Families whose experts the decoder runs."""


class Reader(Protocol):
    """Turns modules into projections."""

    dtype: torch.dtype

    def single(self, module: ModelPart) -> Projection:
        """Return the weight of one."""

    def stacked(self, members: Sequence[Any]) -> tuple[Projection | None, tuple[Projection, ...]]:
        """Return the weights of modules as one, if they can be, and each of them."""


def has_experts(mlp: ModelPart) -> bool:
    """Return whether experts stand where others have an MLP."""
    return isinstance(getattr(mlp, "experts", None), SeparateExperts)


def why_not_experts(mlp: ModelPart) -> str | None:
    """Return None for experts that the decoder runs, else a sentence: what it doesn't know."""
    experts, router = mlp.experts, mlp.gate
    if set(mlp._modules) != {"gate", "experts"} or set(router._parameters) != {"weight"}:
        return "beside its experts and their router there is something that it doesn't know."
    if experts._parameters or type(experts.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return "its experts have biases, or another activation than silu."
    for module in _linears(experts):
        if type(module) not in (nn.Linear, QuantizedLinear):
            return "an expert was replaced by a module that the decoder doesn't know."
        if getattr(getattr(module, "entry", None), "activation", None) is not None:
            return "inputs of its experts are quantized, and the decoder takes them as they are."
        if RANK_UP in getattr(module, "adapter", ()):
            return "an adapter of low rank is set on its experts."
    return None


def read_experts(mlp: ModelPart, read: Reader) -> DecoderExperts:
    """Return what a decoding step reads of experts, by `why_not_experts` known."""
    experts, router = mlp.experts, mlp.gate
    all_gate_up, gate_up = read.stacked(_linears(experts, experts.first))
    all_down, down = read.stacked(_linears(experts, experts.last))
    asked = getattr(router, "norm_topk_prob", None)
    return DecoderExperts(
        router=router.weight.detach(),
        per_token=int(router.top_k),
        sums_to_one=asked is None or bool(asked),
        weights_dtype=torch.float32 if asked is None else read.dtype,
        gate_up=gate_up,
        down=down,
        all_gate_up=all_gate_up,
        all_down=all_down,
    )


def _linears(experts: SeparateExperts, *names: str) -> list[nn.Module]:
    return [
        experts.linear(name, index)
        for name in names or (experts.first, experts.last)
        for index in range(experts.num_experts)
    ]
