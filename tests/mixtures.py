"""Tiny mixtures of experts: what each calls otherwise than `families.DEFAULTS`."""

from collections.abc import Mapping
from typing import Any

import torch

from tests import families

FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "num_key_value_heads": 4}
LATENT |= {"qk_nope_head_dim": 16, "v_head_dim": 16, "moe_intermediate_size": 32}
LATENT |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "topk_group": 1}

MIXTURES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "mixtral": ("mixtral", FOUR),
    "qwen3_moe": ("qwen3_moe", {**QWEN, "head_dim": 16}),
    "qwen2_moe": (
        "qwen2_moe",
        {**QWEN, "shared_expert_intermediate_size": 32, "mlp_only_layers": [0]},
    ),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}),
    "granitemoe": ("granitemoe", FOUR),
    "phimoe": ("phimoe", FOUR),
    "gpt_oss": ("gpt_oss", {**FOUR, "head_dim": 16, "sliding_window": 16}),
    "deepseek_v3": ("deepseek_v3", {**LATENT, "n_group": 2, "first_k_dense_replace": 1}),
    "llama4_text": (
        "llama4_text",
        {
            **FOUR,
            "num_experts_per_tok": 1,
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "interleave_moe_layer_step": 1,
        },
    ),
}
"""Name -> (model_type, changes). Joined and transposed weights, biases, shared experts, blocks
without experts, and Llama 4's way of its own are all there."""


def build(name: str, **changes: Any) -> Any:
    """Return a tiny random float16 model."""
    family, own = MIXTURES[name]
    return families.build(family, tied=False, **{**own, **changes})


def fused_weight(model: Any, layer: str) -> torch.Tensor:
    """Return the (out_features, in_features) view of a layer in a model as transformers has it."""
    fused, _, index = layer.partition("[")
    if not index:
        weight: torch.Tensor = model.get_submodule(layer).weight
        return weight
    whole = model.get_parameter(fused)[int(index.rstrip("]"))]
    module = model.get_submodule(fused.rpartition(".")[0])
    turned = getattr(module, "is_transposed", type(module).__name__ == "Llama4TextExperts")
    return whole.T if turned else whole
