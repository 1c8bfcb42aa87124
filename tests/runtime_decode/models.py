"""Tiny models that the decoder runs."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from qtool.core.experts import separate_experts
from tests import families, mixtures

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def rotary(kind: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a configuration takes: its name is another one since transformers 5."""
    from transformers import LlamaConfig

    new = hasattr(LlamaConfig(), "rope_parameters")
    return {"rope_parameters" if new else "rope_scaling": dict(kind)}


KINDS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tied": True}),
    "llama-all-heads": ("llama", {"num_key_value_heads": 4}),
    "llama-one-kv": ("llama", {"num_key_value_heads": 1}),
    "llama3-rope": ("llama", {"rotary": LLAMA3}),
    "linear-rope": ("llama", {"rotary": LINEAR}),
    "llama-qkv-odd": ("llama", {"intermediate_size": 100}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2-bias": ("qwen2", {}),
    "qwen3-norms": ("qwen3", {"head_dim": 32}),
}
if transformers.__version__ >= "5":  # before, experts are lists, which the decoder doesn't know
    KINDS |= {
        "mixtral": mixtures.MIXTURES["mixtral"],
        "qwen3-experts": mixtures.MIXTURES["qwen3_moe"],
    }


def build(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a random model of one of KINDS, experts apart as in a checkpoint of qtool's."""
    family, changes = KINDS[kind]
    changes = dict(changes)
    if "rotary" in changes:
        changes |= rotary(changes.pop("rotary"))
    model = families.build(family, **{"tied": False, **changes}).to(dtype)
    separate_experts(model)
    return model


def prompt(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Return random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, families.VOCABULARY, (batch, length), generator=generator)
