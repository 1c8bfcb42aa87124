"""OPT (biases everywhere)."""

from qtool.base import ModelAdapter

ADAPTER = ModelAdapter(
    blocks="model.decoder.layers",
    linears=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ),
    residual=("self_attn.out_proj", "fc2"),
    embedding="model.decoder.embed_tokens",
)
