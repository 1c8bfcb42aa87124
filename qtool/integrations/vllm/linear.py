"""vLLM's linears with weights of a qtool checkpoint."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearMethodBase

from qtool.integrations.vllm.incoming import Incoming
from qtool.integrations.vllm.loading_parts import VllmLayer, expect, take
from qtool.integrations.vllm.products import multiply_all, prepare_products
from qtool.integrations.vllm.slices import Rank, StoredLayer, wanted_of


class QuantizedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Loads, prepares and multiplies the stored layers of which vLLM makes one."""

    def __init__(self, name: str, sources: Sequence[StoredLayer]) -> None:
        self.name, self.sources = name, sources

    def create_weights(
        self,
        layer: VllmLayer,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_attributes: Any,
    ) -> None:
        """Say which tensors are expected.

        Raises:
            BackendError: vLLM makes one of other layers than the checkpoint has.
        """
        del input_size, output_size
        rank = Rank(layer.tp_rank, layer.tp_size)
        totals, sizes = totals_of(layer), output_partition_sizes
        wanted = wanted_of(self.sources, sizes, totals, input_size_per_partition, rank)
        expect(layer, Incoming(self.sources, wanted, torch.empty(0).device), params_dtype)

    def process_weights_after_loading(self, layer: VllmLayer) -> None:
        """Bring the weights into the layout of the kernels.

        Raises:
            CheckpointError: tensors are missing.
        """
        layer.qtool_products = prepare_products(take(layer), layer.params_dtype)

    def apply(self, layer: VllmLayer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x @ W.T + bias."""
        y = multiply_all(layer.qtool_products, x)
        return y if bias is None else y + bias


def totals_of(layer: VllmLayer) -> list[int]:
    """Return the rows of the logical weights of a linear, over all ranks, each counted once."""
    heads = getattr(layer, "total_num_kv_heads", None)
    if heads is None:
        return list(getattr(layer, "output_sizes", [layer.output_size]))
    queries, values = layer.total_num_heads * layer.head_size, heads * layer.v_head_size
    return [queries, heads * layer.head_size, values]
