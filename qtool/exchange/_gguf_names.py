"""What llama.cpp calls the tensors of a model, their shapes, and the order of their rows.

Names and orders are those of llama.cpp's convert_hf_to_gguf.py. Only architectures stand here whose
tensors are, but for names and the order of rows of queries and keys, those of transformers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
GGUF_TABLES = {
    EMBEDDING: ("model.embed_tokens.weight", ("vocabulary", "width")),
    HEAD: ("lm_head.weight", ("vocabulary", "width")),
    "output_norm.weight": ("model.norm.weight", ("width",)),
}
"""By name: transformers' name, and the dimensions of the shape."""
LEAVES = {
    "attn_norm.weight": ("input_layernorm.weight", ("width",)),
    "attn_q.weight": ("self_attn.q_proj.weight", ("queries", "width")),
    "attn_k.weight": ("self_attn.k_proj.weight", ("keys", "width")),
    "attn_v.weight": ("self_attn.v_proj.weight", ("keys", "width")),
    "attn_output.weight": ("self_attn.o_proj.weight", ("width", "queries")),
    "ffn_norm.weight": ("post_attention_layernorm.weight", ("width",)),
    "ffn_gate.weight": ("mlp.gate_proj.weight", ("inner", "width")),
    "ffn_up.weight": ("mlp.up_proj.weight", ("inner", "width")),
    "ffn_down.weight": ("mlp.down_proj.weight", ("width", "inner")),
}
"""Of a block, likewise."""
ATTENTION_BIASES = {
    "attn_q.bias": ("self_attn.q_proj.bias", ("queries",)),
    "attn_k.bias": ("self_attn.k_proj.bias", ("keys",)),
    "attn_v.bias": ("self_attn.v_proj.bias", ("keys",)),
}
OTHER_BIASES = {
    "attn_output.bias": ("self_attn.o_proj.bias", ("width",)),
    "ffn_gate.bias": ("mlp.gate_proj.bias", ("inner",)),
    "ffn_up.bias": ("mlp.up_proj.bias", ("inner",)),
    "ffn_down.bias": ("mlp.down_proj.bias", ("width",)),
}
HEAD_NORMS = {
    "attn_q_norm.weight": ("self_attn.q_norm.weight", ("head",)),
    "attn_k_norm.weight": ("self_attn.k_norm.weight", ("head",)),
}
Named = Mapping[str, tuple[str, tuple[str, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One of llama.cpp's, as far as tensors go."""

    model_types: tuple[str, ...]
    """transformers' names for it; the first is what a file is read as."""
    required: Named
    """Of every block."""
    optional: Named
    is_permuted: bool
    """Rows of queries and keys alternate between the two halves of a head."""


ARCHITECTURES = {
    "llama": Architecture(
        model_types=("llama", "mistral"),
        required=LEAVES,
        optional={**ATTENTION_BIASES, **OTHER_BIASES},
        is_permuted=True,
    ),
    "qwen2": Architecture(
        model_types=("qwen2",),
        required={**LEAVES, **ATTENTION_BIASES},
        optional={},
        is_permuted=False,
    ),
    "qwen3": Architecture(
        model_types=("qwen3",),
        required={**LEAVES, **HEAD_NORMS},
        optional=ATTENTION_BIASES,
        is_permuted=False,
    ),
}
"""By llama.cpp's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """Sizes of a model."""

    blocks: int
    vocabulary: int
    width: int
    inner: int
    heads: int
    key_heads: int
    head: int

    def of(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """Return a shape by what its dimensions are called."""
        known = {
            "queries": self.heads * self.head,
            "keys": self.key_heads * self.head,
            "vocabulary": self.vocabulary,
            "width": self.width,
            "inner": self.inner,
            "head": self.head,
        }
        return tuple(known[name] for name in names)

    def heads_of(self, name: str) -> int | None:
        """Return into how many heads the rows of a tensor are cut, if llama.cpp reorders them."""
        leaf = name.rpartition(".")[0].rpartition(".")[2]
        return {"attn_q": self.heads, "attn_k": self.key_heads}.get(leaf)


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor of a model under both its names."""

    gguf: str
    full: str
    """transformers' name."""
    shape: tuple[int, ...]
    is_required: bool


def tensors_of(architecture: Architecture, sizes: Dimensions) -> Iterator[NamedTensor]:
    """Yield all tensors that a model has or may have."""
    for name, (full, dims) in GGUF_TABLES.items():
        yield NamedTensor(name, full, sizes.of(dims), name != HEAD)
    for block in range(sizes.blocks):
        for named, is_required in ((architecture.required, True), (architecture.optional, False)):
            for name, (full, dims) in named.items():
                shape = sizes.of(dims)
                ours = f"model.layers.{block}.{full}"
                yield NamedTensor(f"blk.{block}.{name}", ours, shape, is_required)


def to_halves(rows: int, num_heads: int) -> Tensor:
    """Return which rows of llama.cpp's, (rows,) int64, give those of transformers in their order.

    llama.cpp turns neighbouring rows of a head together, transformers those of its two halves.
    """
    return torch.arange(rows).view(num_heads, -1, 2).transpose(1, 2).reshape(-1)


def to_pairs(rows: int, num_heads: int) -> Tensor:
    """Return the inverse of `to_halves`."""
    return torch.arange(rows).view(num_heads, 2, -1).transpose(1, 2).reshape(-1)
