"""ModelSource: the tensors of an unquantized model, read one by one, no model object built."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import qtool.modeling.adapters
from qtool import plugins
from qtool.base import ModelAdapter
from qtool.checkpoint.shards import Shards, TensorSpec, open_shards, read_json
from qtool.errors import CheckpointError, ModelError
from qtool.modeling.generic import find_adapter
from qtool.modeling.locate import locate
from qtool.scheme import Shape2D

FLOAT_DTYPES = ("F16", "BF16", "F32")
CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel)$")
BLOCK_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
COMPANION_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken")
NOT_COPIED = ("config.json", "model.safetensors.index.json", "quantization_report.json")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """An unquantized model on disk."""

    directory: Path
    public_name: str | None
    config: Mapping[str, Any]
    adapter: ModelAdapter
    shards: Shards
    prefix: str
    """What stored names lack: checkpoints saved from the base model leave its name out."""
    num_blocks: int

    def names(self) -> Iterator[str]:
        """Yield the full names of all tensors, sorted."""
        yield from sorted(self._full(name) for name in self.shards.specs)

    def spec(self, name: str) -> TensorSpec:
        """Return dtype, shape and file of a tensor by its full name."""
        return self.shards.specs[self._stored(name)]

    def read(self, name: str) -> Tensor:
        """Return a tensor by its full name, as it is stored."""
        return self.shards.read(self._stored(name))

    def read_weight(self, layer: str) -> Tensor:
        """Return the weight of a linear or embedding: (out_features, in_features) float32."""
        weight = self.read(f"{layer}.weight").float()
        return weight.T.contiguous() if self._is_transposed(layer) else weight

    def weight_shape(self, layer: str) -> Shape2D:
        """Return the shape that `read_weight` gives, without reading."""
        first, second = self.spec(f"{layer}.weight").shape
        return Shape2D(second, first) if self._is_transposed(layer) else Shape2D(first, second)

    def block_linears(self) -> Iterator[str]:
        """Yield the dotted names of all linears of the decoder blocks, in order of execution."""
        for block in range(self.num_blocks):
            for group in self.adapter.linears:
                yield from (f"{self.adapter.blocks}.{block}.{name}" for name in group)

    @property
    def num_positions(self) -> int | None:
        """How long a sequence may be; None if the configuration doesn't say."""
        found = (self.config.get(key) for key in ("max_position_embeddings", "n_positions"))
        return next((int(positions) for positions in found if positions), None)

    @property
    def residual(self) -> tuple[str, str] | None:
        """The adapter's `residual`, but for variants that normalize after the sum (OPT-350m)."""
        normalizes_after = self.config.get("do_layer_norm_before") is False
        return None if normalizes_after else self.adapter.residual

    @property
    def head_is_tied(self) -> bool:
        """Whether the head uses the embedding's weight."""
        tied = self.config.get("tie_word_embeddings", True)  # transformers' default
        stored = self._has(f"{self.adapter.head}.weight")
        return bool(tied) or not stored

    def companions(self) -> dict[str, bytes]:
        """Return the small files that belong to the model: tokenizer, templates, generation."""
        return {
            path.name: path.read_bytes()
            for path in sorted(self.directory.iterdir())
            if path.is_file()
            and path.suffix in COMPANION_SUFFIXES
            and path.name not in NOT_COPIED
            and not path.name.endswith(".index.json")
        }

    def _is_transposed(self, layer: str) -> bool:
        return self.adapter.conv1d and layer.startswith(self.adapter.blocks + ".")

    def _has(self, name: str) -> bool:
        return self._stored(name) in self.shards.specs

    def _full(self, stored: str) -> str:
        return stored if stored.startswith(self.adapter.head + ".") else self.prefix + stored

    def _stored(self, full: str) -> str:
        return full.removeprefix(self.prefix)


def open_source(model: str) -> ModelSource:
    """Open a model for quantization.

    Args:
        model: Local directory, hub id, `.gguf` file, or `demo:smollm2`.

    Raises:
        ModelError: it isn't an unquantized causal language model that qtool can walk.
        CheckpointError: its files are missing or damaged.
    """
    location = locate(model)
    directory = location.directory
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} has no config.json: it isn't a model directory.")
    config = read_json(directory / "config.json")
    _check_causal(config, directory)
    shards = open_shards(directory)
    adapter = adapter_for(config, directory)
    prefix = _missing_prefix(adapter, shards)
    source = ModelSource(
        directory=directory,
        public_name=location.public_name,
        config=config,
        adapter=adapter,
        shards=shards,
        prefix=prefix,
        num_blocks=_count_blocks(adapter, shards, prefix, directory),
    )
    _check_all_blocks(source)
    _check_tables(source)
    _check_linears(source)
    return source


def _check_causal(config: Mapping[str, Any], directory: Path) -> None:
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ModelError(
            f"{directory} is already quantized ({method}). Start from the original model."
        )
    architectures = config.get("architectures") or []
    known = config.get("model_type") in plugins.names(qtool.modeling.adapters)
    causal = any(CAUSAL.search(name) for name in architectures) or (known and not architectures)
    if not causal or config.get("is_encoder_decoder"):
        what = ", ".join(architectures) or config.get("model_type") or "of unknown type"
        raise ModelError(
            f"{directory} is no causal language model ({what}). qtool quantizes decoder-only "
            "models, whose architecture ends in ForCausalLM or LMHeadModel."
        )


def adapter_for(config: Mapping[str, Any], directory: Path) -> ModelAdapter:
    """Return the adapter of a family, or one made by looking at the model's modules."""
    family = str(config.get("model_type"))
    if family in plugins.names(qtool.modeling.adapters):
        return plugins.load(qtool.modeling.adapters, family, "ADAPTER", ModelAdapter)
    return find_adapter(directory)


def _missing_prefix(adapter: ModelAdapter, shards: Shards) -> str:
    """Return '' if stored names are full, else the prefix that they lack."""
    if any(name.startswith(adapter.blocks + ".") for name in shards.specs):
        return ""
    prefix = adapter.base_prefix + "."
    short = adapter.blocks.removeprefix(prefix)
    if any(name.startswith(short + ".") for name in shards.specs):
        return prefix
    raise ModelError(
        f"No tensor starts with {adapter.blocks}: config.json and weights don't belong together."
    )


def _count_blocks(adapter: ModelAdapter, shards: Shards, prefix: str, directory: Path) -> int:
    start = adapter.blocks.removeprefix(prefix) + "."
    found = {
        int(name.removeprefix(start).split(".", 1)[0])
        for name in shards.specs
        if name.startswith(start)
    }
    missing = sorted(set(range(max(found) + 1)) - found)
    if missing:
        raise CheckpointError(f"{directory}: blocks {missing} are missing. Download it again.")
    return len(found)


def _check_all_blocks(source: ModelSource) -> None:
    wanted = next((source.config[key] for key in BLOCK_COUNTS if key in source.config), None)
    if isinstance(wanted, int) and source.num_blocks < wanted:
        raise CheckpointError(
            f"{source.directory}: config.json names {wanted} blocks, {source.num_blocks} are "
            "stored. Download it again."
        )


def _check_tables(source: ModelSource) -> None:
    tables = [source.adapter.embedding]
    if source.config.get("tie_word_embeddings") is False:
        tables.append(source.adapter.head)
    for table in tables:
        if not source._has(f"{table}.weight"):
            raise ModelError(
                f"{source.directory}: {table}.weight is missing, which a causal language model "
                "needs. Download it again."
            )


def _check_linears(source: ModelSource) -> None:
    for layer in source.block_linears():
        name = f"{layer}.weight"
        if not source._has(name):
            raise ModelError(
                f"{source.directory}: {name} is missing; the adapter of "
                f"{source.config.get('model_type')!r} expects it in each block."
            )
        spec = source.spec(name)
        if spec.dtype not in FLOAT_DTYPES:
            raise ModelError(
                f"{spec.file}: {name} is {spec.dtype}; qtool reads {', '.join(FLOAT_DTYPES)}."
            )
        if len(spec.shape) != 2:  # noqa: PLR2004
            raise ModelError(f"{spec.file}: {name} has shape {spec.shape}, which is no matrix.")
