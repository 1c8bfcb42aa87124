"""Phi-3 (q, k, v in one linear; gate and up in another)."""

from qtool.base import ModelAdapter, Producer

ADAPTER = ModelAdapter(
    blocks="model.layers",
    linears=(
        ("self_attn.qkv_proj",),
        ("self_attn.o_proj",),
        ("mlp.gate_up_proj",),
        ("mlp.down_proj",),
    ),
    producers=(
        Producer("input_layernorm"),
        Producer("self_attn.qkv_proj", "attention"),
        Producer("post_attention_layernorm"),
        Producer("mlp.gate_up_proj", "gate"),
    ),
    residual=("self_attn.o_proj", "mlp.down_proj"),
    embedding="model.embed_tokens",
)
