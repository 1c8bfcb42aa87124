"""GPT-NeoX and Pythia (q, k, v interleaved in one linear)."""

from qtool.base import ModelAdapter, Producer

ADAPTER = ModelAdapter(
    blocks="gpt_neox.layers",
    linears=(
        ("attention.query_key_value",),
        ("attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ),
    producers=(
        Producer("input_layernorm"),
        Producer("attention.query_key_value", "heads"),
        Producer("post_attention_layernorm"),
        Producer("mlp.dense_h_to_4h", "activation"),
    ),
    residual=("attention.dense", "mlp.dense_4h_to_h"),
    embedding="gpt_neox.embed_in",
    head="embed_out",
    base_prefix="gpt_neox",
)
