"""vLLM's embeddings and heads with tables of a qtool checkpoint."""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from qtool.checkpoint.manifest import LayerEntry
from qtool.errors import BackendError
from qtool.integrations.vllm.incoming import Incoming
from qtool.integrations.vllm.loading_parts import VllmLayer, expect, take
from qtool.integrations.vllm.products import multiply_all, prepare_products
from qtool.integrations.vllm.slices import Rank, StoredLayer, Wanted


class QuantizedTableMethod(QuantizeMethodBase):  # type: ignore[misc]
    """An embedding, or a head with a table of its own."""

    def __init__(self, name: str, entry: LayerEntry) -> None:
        self.source = StoredLayer(name, entry)

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
        """Say which tensors are expected: rows of this rank's words, without padding."""
        del output_partition_sizes, input_size, output_size
        here = layer.shard_indices
        words = range(here.org_vocab_start_index, here.org_vocab_end_index)
        rank = Rank(count=layer.tp_size)  # any: all hold the same columns
        wanted = Wanted(columns=input_size_per_partition, rank=rank, table=words)
        expect(layer, Incoming([self.source], [wanted], torch.empty(0).device), params_dtype)

    def process_weights_after_loading(self, layer: VllmLayer) -> None:
        """Bring the table into the layout of the kernels.

        Raises:
            CheckpointError: tensors are missing.
        """
        layer.qtool_products = prepare_products(take(layer), layer.qtool_dtype)

    def embedding(self, layer: VllmLayer, ids: Tensor) -> Tensor:
        """Return the rows of words, (*ids.shape, embedding_dim), counted from this rank's first."""
        return layer.qtool_products[0].rows(ids)

    def apply(self, layer: VllmLayer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return logits of this rank's words, and zeros for padding."""
        return logits_of(layer, layer, x, bias)

    def tie_weights(self, layer: VllmLayer, embed_tokens: VllmLayer) -> VllmLayer:
        """Refuse: the head has a table of its own.

        Raises:
            BackendError: always.
        """
        del layer, embed_tokens
        raise BackendError(
            f"{self.source.name} has a table of its own, and config.json ties it to the embedding. "
            "Set tie_word_embeddings to false there."
        )


class TiedHeadMethod(QuantizeMethodBase):  # type: ignore[misc]
    """A head that multiplies by the table of the embedding."""

    def create_weights(self, layer: VllmLayer, *_args: Any, **_kwargs: Any) -> None:
        """Expect no tensors."""

    def tie_weights(self, layer: VllmLayer, embed_tokens: VllmLayer) -> VllmLayer:
        """Let the head use the table.

        Raises:
            BackendError: this model of vLLM doesn't let embeddings be quantized.
        """
        if not isinstance(embed_tokens.quant_method, QuantizedTableMethod):
            raise BackendError(
                "The checkpoint has a quantized embedding, which vLLM's model can't have. Quantize "
                "again with `--set embedding=null`."
            )
        layer.qtool_table = (embed_tokens,)  # a tuple: not a submodule, so it isn't there twice
        return layer

    def apply(self, layer: VllmLayer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return logits of this rank's words, and zeros for padding."""
        return logits_of(layer, layer.qtool_table[0], x, bias)


def logits_of(head: VllmLayer, table: VllmLayer, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return x @ W.T + bias, as wide as vLLM's table of this rank is with padding."""
    y = multiply_all(table.qtool_products, x)
    y = torch.nn.functional.pad(y, (0, head.num_embeddings_per_partition - y.shape[-1]))
    return y if bias is None else y + bias
