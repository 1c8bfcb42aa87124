"""Tiny random decoders: two blocks, width 64, seeded, one per model family."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 96
POSITIONS = 512

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# What a family calls otherwise, or needs besides; a family that isn't here takes the defaults.
DIFFERENT: Mapping[str, Mapping[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "rotary_dim": 8},
    "gemma": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "n_inner": 96},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "num_heads": 4,
        "num_layers": 2,
        "window_size": 16,
    },
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "rotary_dim": 8},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "qwen2_moe": {"moe_intermediate_size": 32, "num_experts": 4},
    "qwen3": {"head_dim": 16},
}


def configuration(family: str, *, tied: bool, **changes: Any) -> Any:
    """Return the configuration of a tiny model of a family."""
    from transformers import AutoConfig

    values = {**DEFAULTS, **DIFFERENT.get(family, {}), **changes}
    return AutoConfig.for_model(family, **values, tie_word_embeddings=tied)


def build(family: str, *, tied: bool = False, seed: int = 0, **changes: Any) -> Any:
    """Return a tiny random float16 model."""
    from transformers import AutoModelForCausalLM

    config = configuration(family, tied=tied, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # initial biases and norms are constants: too kind
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model.half().eval()


def save_tokenizer(directory: Path) -> None:
    """Write a tokenizer of whole words, `w3` to `w95`, that works offline."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{index}" for index in range(3, VOCABULARY))]
    model = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    ).save_pretrained(directory)


def text(num_words: int, seed: int = 0) -> str:
    """Return random words of the tiny vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(3, VOCABULARY, (num_words,), generator=generator)
    return " ".join(f"w{index}" for index in drawn.tolist())
