"""Replace the layers of an empty transformers model by modules that await quantized parts."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from qtool.base import CausalModel
from qtool.checkpoint.manifest import LayerEntry, Manifest
from qtool.core.experts import expert_name, separate_experts
from qtool.errors import BackendError, CheckpointError
from qtool.integrations.transformers.loading import is_another_class
from qtool.modeling.kinds_of_weights import is_table
from qtool.runtime.modules import QuantizedEmbedding, QuantizedLinear, QuantizedWeight, TiedHead


def install_modules(model: CausalModel, manifest: Manifest) -> dict[str, str]:
    """Replace the quantized layers of an empty model.

    Until `remove_stand_ins`, each has an attribute `weight` that transformers may initialize.

    Returns:
        Name of each replaced module -> of its layer in the manifest.

    Raises:
        CheckpointError: the model has no such layer, or one of another shape.
    """
    if any(expert_name(name) for name in manifest.layers):
        separate_experts(model)
    modules = dict(model.named_modules())
    head = next((n for n, part in modules.items() if part is model.get_output_embeddings()), None)
    installed: dict[str, str] = {}
    for name, entry in manifest.layers.items():
        target = _target(model, name, modules, head)
        if target is not None and entry.shared_with is None:
            _replace(model, target, _replacement(name, modules[target], entry))
            installed[target] = name
    for name, entry in manifest.layers.items():
        if entry.shared_with is not None and head is not None:
            _check_shape(name, modules[head], entry)
            _tie(model, head, _target(model, entry.shared_with, modules, head))
            installed[head] = name
    if is_another_class(model) and head is not None and head not in installed:
        _tie_new_head(model, head)
    if any(isinstance(model.get_submodule(name), QuantizedEmbedding) for name in installed):
        _leave_other_ties(model, installed)
    return installed


def remove_stand_ins(model: nn.Module) -> None:
    """Take away what transformers may have initialized.

    A head that isn't tied answers for its dtype, for which Mamba's code asks its weight.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for module in model.modules():
        if isinstance(module, (QuantizedWeight, TiedHead)):
            stand_in = vars(module).pop("weight", None)
            if module is head and isinstance(module, QuantizedLinear) and stand_in is not None:
                vars(module)["weight"] = torch.empty(0, dtype=stand_in.dtype)


def renamed_layers(layers: Mapping[str, Any], installed: Mapping[str, str]) -> dict[str, Any]:
    """Return the manifest's entries as a model of another class of the family saves them.

    Such a model lacks the prefix of its own part, or has more before it, and may have no head.
    """
    targets = {name: target for target, name in installed.items()}
    kept = [name for name in layers if name in installed.values()]
    return {targets.get(name, name): _renamed(layers[name], targets) for name in kept}


def _renamed(entry: Mapping[str, Any], targets: Mapping[str, str]) -> dict[str, Any]:
    shared = entry.get("shared_with")
    return {**entry, "shared_with": targets.get(shared, shared)} if shared else dict(entry)


def _target(
    model: CausalModel, name: str, modules: Mapping[str, nn.Module], head: str | None
) -> str | None:
    """Return the module of a layer; None for a head that this class of model doesn't have.

    Classes of a family name their common part differently: the base model's has no prefix.
    """
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if candidate in modules:
            return candidate
    first = name.partition(".")[0]
    if is_another_class(model) and not name.startswith(prefix) and first not in modules:
        return None
    # Some versions of transformers rename the head, and its tensors while loading.
    if head is None or "." in name:
        raise CheckpointError(f"The model has no layer {name}; the checkpoint holds it.")
    return head


def _tie_new_head(model: CausalModel, head: str) -> None:
    """Tie a head that the quantized model hadn't, where its class ties it to the embedding."""
    table = next((n for n, m in model.named_modules() if m is model.get_input_embeddings()), None)
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and isinstance(model.get_input_embeddings(), QuantizedEmbedding):
        _tie(model, head, table)


def _tie(model: CausalModel, head: str, shared_with: str | None) -> None:
    """Let the head use the parts of the embedding; a bias stays its own."""
    embedding = None if shared_with is None else model.get_submodule(shared_with)
    if not isinstance(embedding, QuantizedEmbedding):
        raise CheckpointError(f"{head} shares {shared_with}, which is no quantized embedding.")
    bias = getattr(model.get_submodule(head), "bias", None)
    _replace(model, head, TiedHead(embedding, bias))


def _leave_other_ties(model: CausalModel, installed: Collection[str]) -> None:
    """Let transformers tie what isn't quantized, such as the bias of BERT's head to its owner's."""
    gone = {f"{name}.weight" for name in installed}
    ties = getattr(model, "all_tied_weights_keys", {})
    model.all_tied_weights_keys = {
        name: to for name, to in ties.items() if gone.isdisjoint((name, to))
    }
    model.tie_weights = partial(_tie_others, model)  # of a function with a name: it can be pickled
    model.tie_weights()


def _tie_others(
    model: CausalModel,
    missing_keys: set[str] | None = None,
    recompute_mapping: bool | None = None,  # noqa: FBT001 - as transformers 5 passes it
) -> None:
    """Stand in for a model's `tie_weights`: there is no `weight` of a table to tie."""
    del recompute_mapping
    if model.all_tied_weights_keys:
        type(model).tie_weights(model, missing_keys, recompute_mapping=False)
    elif not hasattr(model, "get_expanded_tied_weights_keys"):  # transformers 4: modules tie
        heads = [name for name, part in model.named_modules() if isinstance(part, TiedHead)]
        for owner in {name.rpartition(".")[0] for name in heads} - {""}:
            getattr(model.get_submodule(owner), "_tie_weights", _nothing)()


def _nothing() -> None:
    pass


def _check_shape(name: str, old: nn.Module, entry: LayerEntry) -> None:
    shape = tuple(old.weight.shape)  # type: ignore[arg-type]
    if sorted(shape) != sorted(entry.shape):  # GPT-2 stores the transpose
        raise CheckpointError(
            f"{name} has shape {shape} in the model, {tuple(entry.shape)} in the checkpoint."
        )


def _replacement(name: str, old: nn.Module, entry: LayerEntry) -> QuantizedWeight:
    weight = getattr(old, "weight", None)
    if not isinstance(weight, torch.Tensor) or isinstance(old, QuantizedWeight):
        raise BackendError(f"{name} has no plain weight to replace.")
    _check_shape(name, old, entry)
    new: QuantizedWeight
    if isinstance(old, nn.Embedding):
        if not is_table(old):
            raise CheckpointError(
                f"{name} is quantized, and {type(old).__name__} does more than look up its rows. "
                "Quantize the original again, without a section 'embedding'."
            )
        factor = float(getattr(old, "scalar_embed_scale", getattr(old, "embed_scale", 1.0)))
        new = QuantizedEmbedding(entry, weight.dtype, factor)
    else:
        new = QuantizedLinear(entry, getattr(old, "bias", None))
    return new


def _replace(model: CausalModel, name: str, new: nn.Module) -> None:
    # A family may initialize the weights of its linears where it makes buffers that no file holds:
    # transformers must not skip that, so there is something to initialize, marked as done.
    stand_in = torch.empty_like(model.get_submodule(name).weight, device="meta")
    stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
    vars(new)["weight"] = stand_in
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
