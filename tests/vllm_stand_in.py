"""What qtool's plug-in needs of vLLM, for tests where vLLM isn't installed.

Written after reading vLLM 0.32.0 and 0.33.0 (`model_executor/layers/linear.py`,
`layers/vocab_parallel_embedding.py`, `layers/quantization/`, `parameter.py`): names, constructors,
attributes that a method of quantization reads, and the order of its calls. What vLLM does besides
(its own weights, communication) isn't here. Where vLLM is installed, the same tests run on it.
"""

import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

PADDING = 64
LAYERS = "vllm.model_executor.layers"
RANKED = (f"{LAYERS}.linear", f"{LAYERS}.vocab_parallel_embedding", "vllm.model_executor.parameter")
"""Modules that have their own names for the rank and the number of ranks."""


class QuantizeMethodBase:
    def process_weights_after_loading(self, _layer):
        return


class QuantizationConfig:
    def __init__(self):
        self.packed_modules_mapping = {}


class LinearMethodBase(QuantizeMethodBase):
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(self, layer, **_sizes):
        pass


class BasevLLMParameter(nn.Parameter):
    def __new__(cls, data, **_others):
        return super().__new__(cls, data=data, requires_grad=False)

    def __init__(self, _data, weight_loader):
        self.weight_loader = weight_loader


class LinearBase(nn.Module):
    def __init__(self, input_size, output_size, quant_config, prefix):
        super().__init__()
        linear = sys.modules[RANKED[0]]
        self.input_size, self.output_size, self.prefix = input_size, output_size, prefix
        self.params_dtype = torch.get_default_dtype()
        self.quant_method = quant_config.get_quant_method(self, prefix)
        self.tp_rank = linear.get_tensor_model_parallel_rank()
        self.tp_size = linear.get_tensor_model_parallel_world_size()

    def create(self, columns, rows):
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=columns,
            output_partition_sizes=rows,
            input_size=self.input_size,
            output_size=self.output_size,
            params_dtype=self.params_dtype,
            weight_loader=None,
        )

    def forward(self, x):
        return self.quant_method.apply(self, x, None), None


class ReplicatedLinear(LinearBase):
    def __init__(self, input_size, output_size, quant_config=None, prefix="", **_options):
        super().__init__(input_size, output_size, quant_config, prefix)
        self.create(input_size, [output_size])


class ColumnParallelLinear(LinearBase):
    def __init__(self, input_size, output_size, quant_config=None, prefix="", **_options):
        super().__init__(input_size, output_size, quant_config, prefix)
        sizes = getattr(self, "output_sizes", [output_size])
        self.create(input_size, [size // self.tp_size for size in sizes])


class MergedColumnParallelLinear(ColumnParallelLinear):
    def __init__(self, input_size, output_sizes, quant_config=None, prefix="", **_options):
        self.output_sizes = output_sizes
        super().__init__(input_size, sum(output_sizes), quant_config, prefix)


class QKVParallelLinear(ColumnParallelLinear):
    def __init__(
        self,
        hidden_size,
        head_size,
        total_num_heads,
        total_num_kv_heads,
        quant_config=None,
        prefix="",
        **_options,
    ):
        self.head_size = self.v_head_size = head_size
        self.total_num_heads, self.total_num_kv_heads = total_num_heads, total_num_kv_heads
        ranks = sys.modules[RANKED[0]].get_tensor_model_parallel_world_size()
        shared = max(1, total_num_kv_heads // ranks) * head_size * ranks
        self.output_sizes = [total_num_heads * head_size, shared, shared]
        super().__init__(hidden_size, sum(self.output_sizes), quant_config, prefix)


class RowParallelLinear(LinearBase):
    def __init__(self, input_size, output_size, quant_config=None, prefix="", **_options):
        super().__init__(input_size, output_size, quant_config, prefix)
        self.create(input_size // self.tp_size, [output_size])


class VocabParallelEmbedding(nn.Module):
    def __init__(self, num_embeddings, embedding_dim, quant_config=None, prefix=""):
        super().__init__()
        table = sys.modules[RANKED[1]]
        self.tp_rank = table.get_tensor_model_parallel_rank()
        self.tp_size = table.get_tensor_model_parallel_world_size()
        self.org_vocab_size, self.embedding_dim = num_embeddings, embedding_dim
        padded = -(-num_embeddings // PADDING) * PADDING
        self.num_embeddings_per_partition = padded // self.tp_size
        first = self.tp_rank * self.num_embeddings_per_partition
        last = first + self.num_embeddings_per_partition
        self.shard_indices = SimpleNamespace(
            org_vocab_start_index=min(first, num_embeddings),
            org_vocab_end_index=min(last, num_embeddings),
        )
        self.quant_method = quant_config.get_quant_method(self, prefix)
        self.quant_method.create_weights(
            self,
            embedding_dim,
            [self.num_embeddings_per_partition],
            embedding_dim,
            padded,
            params_dtype=torch.get_default_dtype(),
            weight_loader=None,
        )


class ParallelLMHead(VocabParallelEmbedding):
    def tie_weights(self, embed_tokens):
        return self.quant_method.tie_weights(self, embed_tokens)


REGISTERED: dict[str, Any] = {}


def register_quantization_config(name: str) -> Any:
    def register(cls: type) -> type:
        REGISTERED[name] = cls
        return cls

    return register


def modules() -> dict[str, ModuleType]:
    """Return the modules, by the names that vLLM has for them."""
    found: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.config": {"get_current_vllm_config_or_none": lambda: None},
        "vllm.model_executor": {},
        "vllm.model_executor.parameter": {"BasevLLMParameter": BasevLLMParameter},
        LAYERS: {},
        f"{LAYERS}.linear": _named(
            LinearBase,
            LinearMethodBase,
            UnquantizedLinearMethod,
            ReplicatedLinear,
            ColumnParallelLinear,
            MergedColumnParallelLinear,
            QKVParallelLinear,
            RowParallelLinear,
        ),
        f"{LAYERS}.quantization": {"register_quantization_config": register_quantization_config},
        f"{LAYERS}.quantization.base_config": _named(QuantizationConfig, QuantizeMethodBase),
        f"{LAYERS}.vocab_parallel_embedding": _named(VocabParallelEmbedding, ParallelLMHead),
    }
    made = {}
    for name, attributes in found.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(attributes, __path__=[])
    return made


def _named(*classes: type) -> dict[str, type]:
    return {cls.__name__: cls for cls in classes}


def parts_of_layer(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Return the stored tensors of a layer by the names of its parts."""
    start = f"{name}."
    return {full.removeprefix(start): t for full, t in tensors.items() if full.startswith(start)}


def load(layer: Any, tensors: dict[str, torch.Tensor], names: Sequence[str], shards: Any):
    """Hand a layer the tensors of stored ones, as vLLM's loaders do, and let it prepare them."""
    for name, shard in zip(names, shards, strict=True):
        for part, values in parts_of_layer(tensors, name).items():
            parameter: Any = getattr(layer, part)
            arguments = (parameter, values) if shard is None else (parameter, values, shard)
            parameter.weight_loader(*arguments)
    layer.quant_method.process_weights_after_loading(layer)
