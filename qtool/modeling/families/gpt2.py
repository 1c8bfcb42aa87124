"""GPT-2, whose linears are `Conv1D`: stored as (in_features, out_features)."""

from qtool.base import ModelAdapter

ADAPTER = ModelAdapter(
    blocks="transformer.h",
    linears=(
        ("attn.c_attn",),
        ("attn.c_proj",),
        ("mlp.c_fc",),
        ("mlp.c_proj",),
    ),
    residual=("attn.c_proj", "mlp.c_proj"),
    embedding="transformer.wte",
    base_prefix="transformer",
    conv1d=True,
)
