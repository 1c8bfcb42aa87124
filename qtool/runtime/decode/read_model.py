"""Read the weights of a loaded transformers model of Llama's kind."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from qtool.base import CausalModel, KernelBackend, ModelConfig, ModelPart
from qtool.errors import BackendError
from qtool.runtime.decode.beside import low_rank_beside
from qtool.runtime.decode.read_experts import (
    OF_EXPERTS,
    has_experts,
    read_experts,
    why_not_experts,
)
from qtool.runtime.decode.weights import (
    DecoderLayer,
    DecoderShape,
    DecoderWeights,
    Projection,
    Projections,
    RankPart,
)
from qtool.runtime.held import finish_packing
from qtool.runtime.modules import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
    TiedHead,
)
from qtool.runtime.rank_modules import SpreadLinear

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", *OF_EXPERTS)
OF_MLP = ("gate_proj", "up_proj", "down_proj")
ROTARY = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose frequencies don't depend on the length."""


def why_not(model: CausalModel) -> str | None:
    """Return None for a model that the decoder runs, else a sentence: what it doesn't know."""
    family = getattr(model.config, "model_type", "unknown")
    if family not in FAMILIES:
        return f"the decoder knows {', '.join(FAMILIES)}; this model is a {family}."
    if not type(model).forward.__module__.startswith(f"transformers.models.{family}."):
        return f"{type(model).__name__} isn't the model that transformers calls {family}."
    if not (hasattr(model, "model") and hasattr(model, "lm_head")):
        return f"{type(model).__name__} has no head that predicts tokens."
    checks = (_why_not_state, _why_not_layers, _why_not_ends)
    return next((reason for check in checks if (reason := check(model))), None)


def weights_of(model: CausalModel, *, backend: KernelBackend | None = None) -> DecoderWeights:
    """Return what a decoding step reads.

    Quantized modules adopt parts of what is fused: they keep no layout of their own where a fused
    one has theirs. Plain linears that are fused are copied.

    Args:
        model: A causal language model, loaded, in evaluation mode, on one device.
        backend: Prepares all quantized weights; None: that of each module.

    Raises:
        BackendError: the decoder doesn't know the model; the message says what.
    """
    reason = why_not(model)
    if reason is not None:
        raise BackendError(f"The decode runner can't run this model: {reason}")
    with torch.no_grad():
        weights = _weights(model, _Reader(model.model.norm.weight.dtype, backend))
    finish_packing(weights.final_norm.device)
    return weights


def _weights(model: CausalModel, read: "_Reader") -> DecoderWeights:
    config, core = model.config, model.model
    attention, rotary = core.layers[0].self_attn, core.rotary_emb
    embedding = read.single(core.embed_tokens)
    head = model.lm_head
    return DecoderWeights(
        shape=DecoderShape(
            num_heads=attention.q_proj.out_features // attention.head_dim,
            num_key_value_heads=attention.k_proj.out_features // attention.head_dim,
            head_dim=attention.head_dim,
            vocab_size=config.vocab_size,
            norm_eps=core.norm.variance_epsilon,
            attention_scale=float(attention.scaling),
            dtype=read.dtype,
        ),
        embedding=embedding,
        layers=tuple(_layer(layer, read) for layer in core.layers),
        final_norm=core.norm.weight.detach(),
        head=embedding if isinstance(head, TiedHead) else read.single(head),
        inverse_frequencies=rotary.inv_freq.detach().float(),
        rotary_scale=float(rotary.attention_scaling),
        longest=_window(config),
        group=getattr(attention.o_proj, "group", None),
    )


def _layer(layer: ModelPart, read: "_Reader") -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    members = (attention.q_proj, attention.k_proj, attention.v_proj)
    biases = [member.bias for member in members]
    experts = read_experts(mlp, read) if has_experts(mlp) else None
    return DecoderLayer(
        input_norm=layer.input_layernorm.weight.detach(),
        qkv=read.fused(*members),
        qkv_bias=None if biases[0] is None else torch.cat(biases).detach().to(read.dtype),
        query_norm=_norm_weight(attention, "q_norm"),
        key_norm=_norm_weight(attention, "k_norm"),
        output=read.single(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=() if experts else read.fused(mlp.gate_proj, mlp.up_proj, interleave=True),
        down=None if experts else read.single(mlp.down_proj),
        experts=experts,
    )


def _norm_weight(attention: ModelPart, name: str) -> Tensor | None:
    norm = getattr(attention, name, None)
    return None if norm is None else norm.weight.detach()


class _Reader:
    """Turns modules into projections, by asking what runs them."""

    def __init__(self, dtype: torch.dtype, backend: KernelBackend | None) -> None:
        self.dtype, self._backend = dtype, backend

    def single(self, module: ModelPart) -> Projection:
        """Return a weight that isn't fused, with what an adapter has beside it."""
        weight = self._alone(module)
        return low_rank_beside(weight, (module,), self.dtype) or weight

    def _alone(self, module: ModelPart) -> Projection:
        """Return a weight: the module's own layout where that will do."""
        if isinstance(module, SpreadLinear):
            inner = self._alone(module.inner)
            return RankPart(inner, module.group, module.rows, is_even=module.is_even)
        backend = self._backend_of(module)
        if backend is None:
            return module.weight.detach()
        if backend is module.choose_backend():
            return module.prepare(self.dtype)[1]
        module.is_copied = True
        return backend.prepare(module.tensor(), self.dtype)

    def fused(self, *members: ModelPart, interleave: bool = False) -> Projections:
        """Return linears that share an input, with what an adapter has beside them."""
        weights = self._together(*members, interleave=interleave)
        return low_rank_beside(weights, members, self.dtype) or weights

    def _together(self, *members: ModelPart, interleave: bool) -> Projections:
        """Return linears that share an input as one, or apart if what runs them leaves them so."""
        backends = {self._backend_of(member) for member in members}
        backend = next(iter(backends))
        if backends == {None}:
            return torch.cat([member.weight.detach() for member in members])
        fused = None
        if len(backends) == 1 and backend is not None:
            tensors = [member.tensor() for member in members]
            fused = backend.fuse(tensors, self.dtype, interleave=interleave)
        if fused is None:
            return self._in_runs(members)
        for member, part in zip(members, fused.parts, strict=True):
            if part is not None and backend is member.choose_backend():
                member.adopt(part, self.dtype)
            else:
                member.is_copied = True
        return fused.prepared

    def _in_runs(self, members: Sequence[Any]) -> tuple[Projection, ...]:
        """Return linears apart, but neighbours of one format and scheme as one."""
        runs = [list(run) for _, run in groupby(members, _format_and_scheme)]
        if len(runs) == 1 or len(runs) == len(members):
            return tuple(map(self._alone, members))
        found: list[Projection] = []
        for run in runs:
            one = self._together(*run, interleave=False) if len(run) > 1 else self._alone(run[0])
            found += one if isinstance(one, tuple) else (one,)
        return tuple(found)

    def stacked(self, members: Sequence[Any]) -> tuple[Projection | None, tuple[Projection, ...]]:
        """Return linears of one shape as one, if what runs them puts them so, and each of them."""
        whole = self.fused(*members)
        if isinstance(whole, tuple):
            return None, whole
        if isinstance(whole, Tensor):
            return whole, whole.split(len(whole) // len(members))
        return whole, tuple(map(self.single, members))

    def _backend_of(self, module: ModelPart) -> KernelBackend | None:
        """Return what runs a module's weight; None: it isn't quantized."""
        if not isinstance(module, QuantizedWeight):
            return None
        return self._backend or module.choose_backend()


def _format_and_scheme(module: ModelPart) -> object:
    """Return what neighbours must have in common; None: it isn't quantized."""
    return (module.entry.format, module.entry.scheme) if hasattr(module, "entry") else None


def _window(config: ModelConfig) -> int | None:
    """Return the width of a sliding window that any layer has."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds and all(kind == "full_attention" for kind in kinds)):
        return None
    return int(window)


def _why_not_state(model: CausalModel) -> str | None:
    if model.training:
        return "it is in training mode; call model.eval()."
    quantized = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    waiting = {id(buffer) for module in quantized for buffer in module.buffers(recurse=False)}
    tensors = [*model.parameters(), *(b for b in model.buffers() if id(b) not in waiting)]
    devices = {tensor.device for tensor in tensors} | {module.device for module in quantized}
    if len(devices) != 1:
        return "it is spread over several devices."
    hooked = (
        module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
        for module in model.modules()
    )
    if any(hooked):
        return "a forward hook is registered on one of its modules, and the decoder calls none."
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return f"its parameters have several dtypes: {dtypes}." if len(dtypes) != 1 else None


def _why_not_layers(model: CausalModel) -> str | None:
    config, core = model.config, model.model
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}, not silu."
    if len(core.layers) != config.num_hidden_layers:
        return "the number of its layers isn't that of its configuration."
    if core.rotary_emb.rope_type not in ROTARY:
        return f"its rotary positions are of the kind {core.rotary_emb.rope_type}."
    head_dim = core.layers[0].self_attn.head_dim
    if 2 * len(core.rotary_emb.inv_freq) != head_dim:
        return "it rotates only a part of each head."
    checks = (_why_not_mlp, _why_not_layer)
    reasons = (check(layer) for layer in core.layers for check in checks)
    return next((reason for reason in reasons if reason), None)


def _why_not_mlp(layer: ModelPart) -> str | None:
    if has_experts(layer.mlp):
        return why_not_experts(layer.mlp)
    if not all(hasattr(layer.mlp, name) for name in OF_MLP):
        return "its MLP isn't one of gate, up and down."
    return None


def _why_not_layer(layer: ModelPart) -> str | None:
    attention, mlp = layer.self_attn, layer.mlp
    inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
    others = [attention.o_proj]
    if not has_experts(mlp):
        others += [getattr(mlp, name) for name in OF_MLP]
    others = [getattr(module, "inner", module) for module in others]
    if any(type(module) not in (nn.Linear, QuantizedLinear) for module in [*inputs, *others]):
        return "a linear layer was replaced by a module that the decoder doesn't know."
    entries = [getattr(module, "entry", None) for module in [*inputs, *others]]
    if any(entry is not None and entry.activation is not None for entry in entries):
        return "inputs of its linear layers are quantized, and the decoder takes them as they are."
    if any(module.bias is not None for module in others):
        return "a linear layer other than query, key and value has a bias."
    if len({module.bias is None for module in inputs}) != 1:
        return "only some of query, key and value have a bias."
    return None


def _why_not_ends(model: CausalModel) -> str | None:
    embedding, head = model.model.embed_tokens, model.lm_head
    if type(embedding) not in (nn.Embedding, QuantizedEmbedding):
        return "its embedding is a module that the decoder doesn't know."
    if isinstance(embedding, QuantizedEmbedding) and embedding.factor != 1.0:
        return "its embedding has a factor."
    if type(getattr(head, "inner", head)) not in (nn.Linear, QuantizedLinear, TiedHead):
        return "its head is a module that the decoder doesn't know."
    return "its head has a bias." if getattr(head, "bias", None) is not None else None
