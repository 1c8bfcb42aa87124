"""The transformers quantizer: replaces modules before the weights are loaded.

Only module replacement is used, which is stable from transformers 4.57 to 5.x. Importing this
module registers it.
"""

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qtool.checkpoint.manifest import QUANT_METHOD, LayerEntry, Manifest, manifest_from_config
from qtool.errors import BackendError, CheckpointError
from qtool.runtime.decoding.generate import accelerate
from qtool.runtime.modules import QuantizedEmbedding, QuantizedLinear, TiedHead


@register_quantization_config(QUANT_METHOD)
class QtoolConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of config.json, kept as it was read so that it is saved unchanged."""

    def __init__(self, **config: Any) -> None:  # noqa: ANN401
        self.quant_method = QUANT_METHOD
        for key, value in config.items():
            setattr(self, key, value)

    def manifest(self) -> Manifest:
        """Return the parsed form."""
        return manifest_from_config(self.to_dict(), "quantization_config")


@register_quantizer(QUANT_METHOD)
class QtoolQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads checkpoints that qtool wrote; quantizing is the command line's work."""

    requires_calibration = True  # without a quantized checkpoint, transformers says so

    def validate_environment(self, *_args: Any, **_kwargs: Any) -> None:  # noqa: ANN401
        """Check the configuration before the model is built."""
        self.quantization_config.manifest()

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """Return the dtype of activations and of what isn't quantized."""
        return dtype or torch.float16

    def _process_model_before_weight_loading(self, model: nn.Module, **_kwargs: Any) -> nn.Module:  # noqa: ANN401
        manifest = self.quantization_config.manifest()
        install(model, manifest)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_kwargs: Any) -> nn.Module:  # noqa: ANN401
        return accelerate(model)

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:  # noqa: ANN401
        """Return True: the parts are buffers and are saved as they were loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return False: codes have no gradient."""
        return False


def install(model: Any, manifest: Manifest) -> None:  # noqa: ANN401
    """Replace the quantized layers of an empty model by modules that await their parts.

    Raises:
        CheckpointError: the model has no such layer, or one of another shape.
    """
    tied: list[tuple[str, str]] = []
    modules = dict(model.named_modules())
    head = next((n for n, part in modules.items() if part is model.get_output_embeddings()), None)
    for name, entry in manifest.layers.items():
        if entry.shared_with is None:
            # Some versions of transformers rename the head, and its tensors while loading.
            target = name if name in modules or "." in name else head
            if target is None or target not in modules:
                raise CheckpointError(f"The model has no layer {name}; the checkpoint holds it.")
            _replace(model, target, _replacement(name, modules[target], entry))
        elif head is not None:
            tied.append((head, entry.shared_with))
    for target, embedding in tied:
        _tie(model, target, embedding)
    for module in model.modules():  # transformers would initialize what is no longer there (GPT-2)
        if any(isinstance(child, QuantizedLinear) for child in module.children()):
            module._is_hf_initialized = True


def _tie(model: Any, head: str, shared_with: str) -> None:  # noqa: ANN401
    """Let the head use the parts of the embedding."""
    embedding = model.get_submodule(shared_with)
    if not isinstance(embedding, QuantizedEmbedding):
        raise CheckpointError(f"{head} shares {shared_with}, which is no quantized embedding.")
    _replace(model, head, TiedHead(embedding))
    model.tie_weights = lambda *_args, **_kwargs: None  # there is no `weight` to tie
    model.all_tied_weights_keys = {}


def _replacement(name: str, old: nn.Module, entry: LayerEntry) -> nn.Module:
    if not isinstance(old.weight, torch.Tensor) or isinstance(old, QuantizedLinear):
        raise BackendError(f"{name} has no plain weight to replace.")
    stored = tuple(old.weight.shape)
    if sorted(stored) != sorted(entry.shape):
        raise CheckpointError(
            f"{name} has shape {stored} in the model, {tuple(entry.shape)} in the checkpoint."
        )
    if isinstance(old, nn.Embedding):
        factor = float(getattr(old, "scalar_embed_scale", getattr(old, "embed_scale", 1.0)))
        return QuantizedEmbedding(entry, old.weight.dtype, factor)
    return QuantizedLinear(entry, getattr(old, "bias", None))


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
