"""Phi-3 (q, k, v in one linear; gate and up in another)."""

from qtool.base import ModelAdapter

ADAPTER = ModelAdapter(
    blocks="model.layers",
    linears=(
        ("self_attn.qkv_proj",),
        ("self_attn.o_proj",),
        ("mlp.gate_up_proj",),
        ("mlp.down_proj",),
    ),
    residual=("self_attn.o_proj", "mlp.down_proj"),
    embedding="model.embed_tokens",
)
