"""Tiny random copies of every causal language model that transformers has.

A configuration is made small by what it calls its sizes, whatever its family; `OTHERS` says what a
family needs besides.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

VOCABULARY = 96
SMALL: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_hidden_size", "ffn_dim"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "dff", "dim_ff"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 16,
    "rotary_dim": 8,
    # mixtures of experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("moe_num_experts", "moe_topk", "moe_k"), 2),
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "zero_expert_num": 2,
    # latent attention
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "o_groups": 2,
    "o_lora_rank": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    # recurrences
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "mamba_dt_rank": 4,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 1,
    "chunk_size": 16,
    "state_size": 8,
    "time_step_rank": 4,
    # images
    "image_size": 28,
    "patch_size": 14,
    "depth": 2,
    **dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 64),
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
    "fullatt_block_indexes": [1],
    # embeddings per layer
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "global_head_dim": 16,
}
LATENT = {"num_key_value_heads": 4}
LATENT_8 = {**LATENT, "head_dim": 8}
FOUR = {"num_hidden_layers": 4}
MIXED = {**FOUR, "layer_types": ["linear_attention", "full_attention"] * 2}
MAMBAS = {**FOUR, "layer_types": ["mamba", "attention"] * 2, "mamba_expand": 2}
OTHERS: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("axk2", "deepseek_v2", "deepseek_v32", "dots3_note_text"), LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "minicpm3"), LATENT),
    **dict.fromkeys(("axk1", "deepseek_v3", "youtu", "longcat_flash"), LATENT_8),
    **dict.fromkeys(("lfm3", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), FOUR),
    "bailing_hybrid": {**LATENT, **MIXED},
    "bamba": {**FOUR, "attn_layer_indices": [1, 3], "mamba_expand": 2},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "granitemoehybrid": MAMBAS,
    "jamba": {
        **FOUR,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "kimi_linear": {**LATENT, **MIXED},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "xlnet": {"d_inner": 96},
    "qwen2_5_vl_text": {
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [2, 3, 3],
            "rope_theta": 1000000.0,
        }
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"expand": 2, "num_heads": 8},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 16},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**FOUR, "layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {
        **FOUR,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "use_mem_rope": True,
        "adapter_rank": 8,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention"] * 2,
        "rope_parameters": {"sliding_attention": None},
    },
    "qwen4_exp_text": MIXED,
    "zaya": {"num_experts_per_tok": 1},
    "xlstm": {"qk_dim_factor": 1.0},
    "xlm": {"emb_dim": 64},
    "roc_bert": {"pronunciation_vocab_size": 96, "shape_vocab_size": 96},
}


@cache
def families() -> tuple[str, ...]:
    """Return the model types that transformers has a causal language model of."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def configuration(family: str, **changes: Any) -> Any:
    """Return the configuration of a tiny model of a family."""
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = CONFIG_MAPPING[family]
    small = _small({**dict.fromkeys(kind.attribute_map), **kind().to_dict()})
    return AutoConfig.for_model(family, **{**small, **OTHERS.get(family, {}), **changes})


def _small(known: Mapping[str, Any]) -> dict[str, Any]:
    """Return small values for what a configuration, and those inside it, call their sizes."""
    inside = {
        key: {**_small(value), **OTHERS.get(kind, {}), "model_type": kind}
        for key, value in known.items()
        if key.endswith("_config") and isinstance(value, dict) and (kind := value.get("model_type"))
    }
    return {**{key: value for key, value in SMALL.items() if key in known}, **inside}


MULTIMODAL = ("gemma3", "llama4", "llava", "mistral3", "mllama", "qwen2_5_vl", "qwen3_vl")
"""Of these the whole is built: a text decoder, and what makes tokens of images."""
TOO_LARGE = 4_000_000


def build(family: str, seed: int = 0, **changes: Any) -> Any:
    """Return a tiny random float16 model, whose norms and biases are no constants.

    Raises:
        ValueError: it has no tiny copy, as a tokenizer of images may have none.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = configuration(family, **changes)
    auto = AutoModelForImageTextToText if family in MULTIMODAL else AutoModelForCausalLM
    with torch.device("meta"):
        size = auto.from_config(config).num_parameters()
    if size > TOO_LARGE:
        raise ValueError(f"the smallest copy has {size} parameters")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model.half().eval()
