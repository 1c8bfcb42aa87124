"""Qwen2 and Qwen2.5 (biases on q, k, v)."""

from qtool.base import ModelAdapter

ADAPTER = ModelAdapter(
    blocks="model.layers",
    linears=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    residual=("self_attn.o_proj", "mlp.down_proj"),
    embedding="model.embed_tokens",
)
