"""vLLM's configuration of a qtool checkpoint: which of its layers are quantized, and how."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from qtool.checkpoint.manifest import QUANT_METHOD, LayerEntry, manifest_from_config
from qtool.errors import BackendError
from qtool.integrations.vllm.embedding import QuantizedTableMethod, TiedHeadMethod
from qtool.integrations.vllm.linear import QuantizedLinearMethod
from qtool.integrations.vllm.loading_parts import VllmLayer
from qtool.integrations.vllm.slices import embedding_name, sources_of

OLDEST_CARD = 80
"""Compute capability, as vLLM writes it: 8.0."""


class QtoolVllmConfig(QuantizationConfig):  # type: ignore[misc]
    """`quantization_config` of config.json, whose layers have the names that vLLM has for them."""

    def __init__(self, layers: Mapping[str, LayerEntry]) -> None:
        super().__init__()
        self.layers = dict(layers)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QtoolVllmConfig":
        """Parse it.

        Raises:
            CheckpointError: it is damaged, or of a newer qtool.
        """
        return cls(manifest_from_config(config, "config.json").layers)

    def get_name(self) -> str:
        """Return the name that `--quantization` has for it."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return all dtypes of activations; float32 runs through dequantized weights."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return what the kernels need."""
        return OLDEST_CARD

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return none: config.json has it."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the layers as vLLM renames the modules of this model."""
        renamed = hf_to_vllm_mapper.apply_dict
        new_name = {name: next(iter(renamed({name: None})), name) for name in self.layers}
        self.layers = {
            new_name[name]: replace(entry, shared_with=new_name.get(entry.shared_with or ""))
            for name, entry in self.layers.items()
        }

    def get_quant_method(self, layer: VllmLayer, prefix: str) -> QuantizeMethodBase | None:
        """Return what loads and runs a layer; None: vLLM's own, as for what isn't quantized.

        Raises:
            BackendError: it is one of experts, which vLLM runs as one.
        """
        if isinstance(layer, VocabParallelEmbedding):
            return self._of_table(layer, prefix)
        if isinstance(layer, LinearBase):
            sources = sources_of(prefix, self.packed_modules_mapping, self.layers)
            if all(source.entry is None for source in sources):
                return UnquantizedLinearMethod()
            return QuantizedLinearMethod(prefix, sources)
        if any(name.startswith(f"{prefix}.") for name in self.layers) and _has_experts(layer):
            raise BackendError(
                f"{prefix} holds quantized experts, which vLLM runs as one and qtool's plug-in "
                "can't. Run the model through transformers."
            )
        return None

    def _of_table(self, layer: VllmLayer, prefix: str) -> QuantizeMethodBase | None:
        prefix = prefix.lstrip(".")  # of a head whose model has no name
        if not prefix and not isinstance(layer, ParallelLMHead):  # some models don't say
            shape = (layer.org_vocab_size, layer.embedding_dim)
            prefix = embedding_name(self.layers, shape) or prefix
        entry = self.layers.get(prefix)
        if entry is None:
            return None
        return TiedHeadMethod() if entry.shared_with else QuantizedTableMethod(prefix, entry)


def _has_experts(layer: VllmLayer) -> bool:
    """Return whether it is vLLM's layer of experts, whatever its version calls it."""
    return any("Experts" in kind.__name__ or "MoE" in kind.__name__ for kind in type(layer).mro())
