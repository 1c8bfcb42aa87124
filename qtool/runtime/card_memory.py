"""What a checkpoint takes on a card, from its headers and configuration alone.

Weights as backend `cuda` lays them out for `generate`, those that share an input as one; integers
beside them for inputs that are quantized; what isn't quantized in 16 bits; keys and values per
token.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch

from qtool.base import ModelConfig, QuantizedTensor
from qtool.checkpoint.manifest import LayerEntry
from qtool.checkpoint.reader import CheckpointReader
from qtool.formats._in_planes import opened_weight
from qtool.runtime.backends.cuda.integers import integer_bytes
from qtool.runtime.backends.cuda.room import card_bytes, fused_bytes
from qtool.runtime.decode.read_model import FAMILIES

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears of the decoder that share an input; rows of the second kind alternate."""
ACTIVATIONS = torch.float16
"""Of activations, of the cache, and of what isn't quantized."""


@dataclass(frozen=True, slots=True)
class CardMemory:
    """Bytes on a card, but for activations."""

    weight_bytes: int
    cache_bytes_per_token: int | None
    """Keys and values of all layers, while no window is full; None: nobody could say."""


def card_memory(reader: CheckpointReader, config: ModelConfig) -> CardMemory:
    """Return what a checkpoint takes on a card.

    Args:
        reader: The checkpoint; only headers are read.
        config: Its configuration, as transformers parses it.
    """
    layers = reader.manifest.layers
    plain = (reader.spec(name) for name in reader.names() if name not in layers)
    weights = sum(prod(spec.shape) * ACTIVATIONS.itemsize for spec in plain)
    quantized = [entry for entry in layers.values() if entry.activation is not None]
    fuses = config.model_type in FAMILIES and not quantized
    weights += sum(_layer_bytes(layers, fuses=fuses))
    weights += sum(integer_bytes(_without_parts(entry)) for entry in quantized)
    return CardMemory(weights, cache_bytes(config.get_text_config(), ACTIVATIONS))


def _layer_bytes(layers: Mapping[str, LayerEntry], *, fuses: bool) -> Iterator[int]:
    """Yield what each layer takes, or those that are fused take together."""
    left = {name: _without_parts(entry) for name, entry in layers.items() if not entry.shared_with}
    for name in list(left) if fuses else ():
        parent, _, last = name.rpartition(".")
        for kind in (kind for kind in FUSED if kind[0] == last):
            members = [f"{parent}.{each}" for each in kind]
            if all(member in left for member in members):
                tensors = [left[member] for member in members]
                together = fused_bytes(tensors, interleave=len(kind) == 2)  # noqa: PLR2004
                if together is not None:
                    yield together
                    for member in members:
                        del left[member]
    yield from map(card_bytes, left.values())


def _without_parts(entry: LayerEntry) -> QuantizedTensor:
    return opened_weight(QuantizedTensor(entry.format, entry.scheme, entry.shape, {}))


def cache_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the size of the keys and values of one token, by a transformers configuration.

    0 if it has no heads: the state of a recurrent model doesn't grow. Exact where all layers keep
    keys and values of whole heads; others are asked by `modeling.cache_growth`.
    """
    queries = getattr(config, "num_attention_heads", None)
    if not queries:
        return 0
    heads = getattr(config, "num_key_value_heads", None) or queries
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    return int(2 * config.num_hidden_layers * heads * width * dtype.itemsize)
