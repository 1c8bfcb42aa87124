"""Many model families, tiny: what each calls otherwise than `families.DEFAULTS`.

`families` has those that most tests use; these are for what must hold for all that qtool walks.
"""

from collections.abc import Mapping
from typing import Any

import torch

from tests import families

GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 96}
HEADS = {"head_dim": 16}
WINDOW = {"head_dim": 16, "sliding_window": 16}
GEMMA = {**WINDOW, "query_pre_attn_scalar": 16}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "num_key_value_heads": 4}
LATENT |= {"qk_nope_head_dim": 16, "v_head_dim": 16, "head_dim": 8}
PER_LAYER = {"head_dim": 16, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8}
PER_LAYER |= {"num_kv_shared_layers": 0, "num_hidden_layers": 5}
FALCON = {"bias": False, "alibi": False, "ffn_hidden_size": 96}

ZOO: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "bitnet": ("bitnet", {}),
    "codegen": ("codegen", {**GPT, "rotary_dim": 8}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", WINDOW),
    "ctrl": ("ctrl", {**GPT, "dff": 96}),
    "diffllama": ("diffllama", {}),
    "ernie4_5": ("ernie4_5", {}),
    "exaone4": ("exaone4", {"sliding_window": 16}),
    "falcon": ("falcon", {**FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon-new": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3_text": ("gemma3_text", {**GEMMA, "sliding_window_pattern": 2}),
    "gemma3n_text": (
        "gemma3n_text",
        {**PER_LAYER, "laurel_rank": 8, "activation_sparsity_pattern": None, "altup_num_inputs": 2},
    ),
    "gemma4_text": ("gemma4_text", {**PER_LAYER, "global_head_dim": 16}),
    "glm": ("glm", HEADS),
    "glm4": ("glm4", HEADS),
    "gpt_bigcode": ("gpt_bigcode", {**GPT, "multi_query": True}),
    "gpt_neo": (
        "gpt_neo",
        {
            "num_heads": 4,
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 16,
        },
    ),
    "gptj": ("gptj", {**GPT, "rotary_dim": 8}),
    "granite": ("granite", {}),
    "helium": ("helium", HEADS),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", HEADS),
    "ministral": ("ministral", WINDOW),
    "minicpm3": ("minicpm3", LATENT),
    "modernbert-decoder": ("modernbert-decoder", {}),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}),
    "nanochat": ("nanochat", {}),
    "nemotron": ("nemotron", {}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 16}),
    "persimmon": ("persimmon", {}),
    "phi": ("phi", {}),
    "seed_oss": ("seed_oss", HEADS),
    "smollm3": ("smollm3", {}),
    "starcoder2": ("starcoder2", {}),
    "vaultgemma": ("vaultgemma", {**HEADS, "query_pre_attn_scalar": 16}),
    "xglm": ("xglm", {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4}),
}
"""Name -> (model_type, changes)."""
NOT_WALKED_BEFORE_5 = ("apertus", "gemma3n_text")
"""With transformers 4 qtool refuses them: it can't see their blocks."""


def known() -> list[str]:
    """Return the names of those that the installed transformers has and qtool walks."""
    import transformers

    names = [name for name, (family, _) in ZOO.items() if family in transformers.CONFIG_MAPPING]
    old = transformers.__version__.startswith("4.")
    return [name for name in names if not (old and name in NOT_WALKED_BEFORE_5)]


def build(name: str, *, tied: bool) -> Any:
    """Return a tiny random float16 model."""
    family, changes = ZOO[name]
    return families.build(family, tied=tied, **changes)


def poison_free_memory() -> None:
    """Let memory that is taken next hold NaN, so that what nobody fills is seen."""
    sizes = (16, 64, 256, 1024, 4096, 16384)
    scrap = [torch.full((size,), float("nan")) for size in sizes for _ in range(40)]
    del scrap
