"""The entry point `vllm.general_plugins`: vLLM calls it in each of its processes."""

from qtool.checkpoint.manifest import QUANT_METHOD


def register_with_vllm() -> None:
    """Make vLLM load checkpoints whose `quant_method` is qtool's; call as often as you like."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from qtool.integrations.vllm.config import QtoolVllmConfig

    register_quantization_config(QUANT_METHOD)(QtoolVllmConfig)
