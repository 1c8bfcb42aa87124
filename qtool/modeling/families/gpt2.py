"""GPT-2, whose linears are `Conv1D`: stored as (in_features, out_features)."""

from qtool.base import ModelAdapter, Producer

ADAPTER = ModelAdapter(
    blocks="transformer.h",
    linears=(
        ("attn.c_attn",),
        ("attn.c_proj",),
        ("mlp.c_fc",),
        ("mlp.c_proj",),
    ),
    producers=(
        Producer("ln_1"),
        Producer("attn.c_attn", "attention"),
        Producer("ln_2"),
        Producer("mlp.c_fc", "activation"),
    ),
    residual=("attn.c_proj", "mlp.c_proj"),
    embedding="transformer.wte",
    base_prefix="transformer",
    conv1d=True,
)
