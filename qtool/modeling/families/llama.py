"""Llama 1 to 3, SmolLM and others of `LlamaForCausalLM`; and the families of `ALIKE`."""

from qtool.base import ModelAdapter, Producer

ADAPTER = ModelAdapter(
    blocks="model.layers",
    linears=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    producers=(
        Producer("input_layernorm"),
        Producer("self_attn.v_proj", "attention"),
        Producer("post_attention_layernorm"),
        Producer("mlp.up_proj", "gate"),
    ),
    residual=("self_attn.o_proj", "mlp.down_proj"),
    embedding="model.embed_tokens",
)
