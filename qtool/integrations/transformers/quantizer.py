"""The transformers quantizer: replaces modules before the weights are loaded.

Only module replacement is used, which is stable from transformers 4.57 to 5.x. Importing this
module registers it.
"""

import functools
import importlib
from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qtool.base import CausalModel
from qtool.checkpoint.manifest import QUANT_METHOD, Manifest, manifest_from_config
from qtool.errors import BackendError
from qtool.integrations.transformers import experts, install, loading
from qtool.integrations.transformers.generate import accelerate
from qtool.integrations.transformers.registration import when_imported

KEYS = {
    "format_version",
    "tool_version",
    "source",
    "calibration",
    "recipe",
    "layers",
    "unquantized",
}
V4 = transformers.__version__.startswith("4.")

AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)  # `FirstCheckpoint`
when_imported(
    "peft.tuners.lora.model", functools.partial(importlib.import_module, "qtool.integrations.peft")
)


@register_quantization_config(QUANT_METHOD)
class QtoolConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of config.json, for a model that may be saved again.

    Digests stay out: they are those of the files that were loaded.
    """

    def __init__(self, **config: Any) -> None:
        for key, value in config.items():
            if key in KEYS:
                setattr(self, key, value)
        self.quant_method = QUANT_METHOD

    def manifest(self) -> Manifest:
        """Return the parsed form."""
        return manifest_from_config(self.to_dict(), "config.json")


@register_quantizer(QUANT_METHOD)
class QtoolQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads checkpoints that qtool wrote; quantizing is the command line's work."""

    requires_calibration = True  # without a quantized checkpoint, transformers says so

    def __init__(self, quantization_config: QtoolConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if V4:
            loading.note_files()

    def validate_environment(self, *_args: Any, device_map: Any = None, **_kwargs: Any) -> None:
        """Check the configuration before the model is built, and where its parts shall be.

        Raises:
            CheckpointError: `quantization_config` is damaged.
            BackendError: transformers 4 would leave parts on the disk, and fill them with noise.
        """
        self.quantization_config.manifest()
        if V4 and isinstance(device_map, dict) and "disk" in device_map.values():
            raise BackendError(
                "transformers 4 can't leave quantized weights on the disk. Give device_map room in "
                "memory (max_memory), or install transformers 5."
            )

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """Return the dtype of activations and of what isn't quantized."""
        return dtype or torch.float16

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], _: str) -> list[str]:
        """Refuse a checkpoint that lacks tensors; transformers 4 asks here."""
        loading.refuse_missing(model, missing_keys)
        return missing_keys

    def _process_model_before_weight_loading(self, model: CausalModel, **kwargs: Any) -> Any:
        manifest = self.quantization_config.manifest()
        files = loading.noted_files() if V4 else kwargs["checkpoint_files"]
        self._shards = loading.checked_files(files, manifest, str(model.config.name_or_path))
        self._installed = install.install_modules(model, manifest)
        self._loading = model
        if not V4:
            loading.watch_missing(model)
        return model

    def _process_model_after_weight_loading(self, model: CausalModel, **_kwargs: Any) -> Any:
        install.remove_stand_ins(model)
        loading.check_loaded(model, self._installed, self._shards)
        experts.keep_names(model)
        config = self.quantization_config
        config.layers = install.renamed_layers(config.layers, self._installed)
        model.config.quantization_config = config
        model._weight_conversions = []  # saved again, layers keep the names that the manifest has
        del self._shards, self._installed, self._loading
        return accelerate(model)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> Any:
        """Return what transformers 5 does to stored tensors: nothing to those of single experts.

        Some versions of 5 (5.17) don't say of which model: it is the one that is being loaded.
        """
        loaded = model or (self._loading,)
        kept = experts.without_experts(weight_conversions, *loaded)
        return super().update_weight_conversions(kept, *model)

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:
        """Return True: the parts are buffers and are saved as they were loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return True: codes have no gradient, but adapters and what isn't quantized have."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Return True: without, `Trainer` refuses even to evaluate a model that has no adapter."""
        return True
