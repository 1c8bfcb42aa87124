"""OPT (biases everywhere)."""

from qtool.base import ModelAdapter, Producer

ADAPTER = ModelAdapter(
    blocks="model.decoder.layers",
    linears=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ),
    producers=(
        Producer("self_attn_layer_norm"),
        Producer("self_attn.v_proj", "attention"),
        Producer("final_layer_norm"),
        Producer("fc1", "activation"),
    ),
    residual=("self_attn.out_proj", "fc2"),
    embedding="model.decoder.embed_tokens",
)
