"""ModelSource: the tensors of an unquantized model, read one by one, no model object built."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.base import CausalModel, ModelAdapter, ModelConfig
from qtool.checkpoint.shards import Shards, TensorSpec, open_shards
from qtool.core.experts import expert_name, separated
from qtool.data.windows import positions_of
from qtool.errors import CheckpointError, ModelError
from qtool.modeling.companions import read_companions
from qtool.modeling.config import check_original, parse_config, read_config
from qtool.modeling.discover import known_adapter
from qtool.modeling.encoders import encoder_adapter
from qtool.modeling.experts import StoredExpert, find_experts
from qtool.modeling.families import families
from qtool.modeling.joined import Joined, find_joined
from qtool.modeling.kinds_of_weights import PlainWeight, plain_weights
from qtool.modeling.locate import Location
from qtool.modeling.skeleton import FLOAT_DTYPES, dtype_message, empty_model, match_names
from qtool.scheme import Shape2D
from qtool.wording import list_names


@dataclass(frozen=True, slots=True)
class ModelSource:
    """An unquantized model on disk."""

    directory: Path
    public_name: str | None
    config: Mapping[str, Any]
    """config.json as a checkpoint may have it: no code is named, and whether the head is tied is
    said."""
    parsed: Any
    """The same as transformers understands it, with its defaults: read once, not to be changed."""
    adapter: ModelAdapter
    shards: Shards
    prefix: str
    """What stored names lack: checkpoints saved from the base model leave its name out."""
    aliases: Mapping[str, str]
    """Stored name by the name that the model, as transformers builds it, has for a tensor."""
    full_names: Mapping[str, str]
    """The other way round."""
    joined: Mapping[str, Joined]
    """What loading computes of several stored tensors, by the model's name."""
    plain: Mapping[str, PlainWeight]
    """Weights of two dimensions and more that no linear or table is made of, by full name."""
    num_blocks: int
    num_positions: int | None
    """How long a sequence may be; None if the configuration doesn't say."""
    residual: tuple[str, str] | None
    """The adapter's `residual`, but for variants that normalize after the sum (OPT-350m)."""
    head_is_tied: bool
    """Whether the head uses the embedding's weight."""
    experts: Mapping[str, StoredExpert]
    """Weights of experts that the model fuses, each with a full name of its own."""

    def names(self) -> Iterator[str]:
        """Yield the full names of all tensors, sorted; each weight of an expert is one."""
        held = {name for expert in self.experts.values() for name in expert.names()}
        others = (self._full(name) for name in self.shards.specs if name not in held)
        yield from sorted((*others, *self.experts))

    def stored_experts(self) -> Iterator[str]:
        """Yield the full names of the tensors that the experts' weights are stored in."""
        held = {name for expert in self.experts.values() for name in expert.names()}
        yield from sorted(map(self._full, held))

    def stored_name(self, full: str) -> str:
        """Return how a tensor is called in its file, by its full name or the model's.

        An expert's weight that isn't stored by itself keeps its full name.
        """
        if full in self.experts:
            return full
        stored = full.removeprefix(self.prefix)
        if stored in self.shards.specs and self._full(stored) == full:
            return stored
        return self.aliases.get(full, stored)

    def has(self, name: str) -> bool:
        """Return whether a tensor of that name is stored."""
        return name in self.experts or self.stored_name(name) in self.shards.specs

    def spec(self, name: str) -> TensorSpec:
        """Return dtype, shape and file of a tensor by its full name."""
        expert = self.experts.get(name)
        if expert is not None:
            first = self.shards.specs[next(expert.names())]
            return TensorSpec(first.file, first.dtype, tuple(expert.shape))
        return self.shards.specs[self.stored_name(name)]

    def read(self, name: str) -> Tensor:
        """Return a tensor by its full name, as it is stored, or as loading computes it.

        An expert's is never transposed.
        """
        if name in self.experts:
            return self.experts[name].read(self.shards)
        if name in self.joined and name not in self.shards.specs:
            return self.joined[name].read(self.shards, name)
        return self.shards.read(self.stored_name(name))

    def read_exact(self, name: str) -> Tensor:
        """Return a tensor by its full name, in float32 where it would be rounded to be stored."""
        return self.read(name)

    def read_weight(self, layer: str) -> Tensor:
        """Return the weight of a linear or embedding: (out_features, in_features) float32."""
        weight = self.read_exact(f"{layer}.weight").float()
        return weight.T.contiguous() if self._is_transposed(layer) else weight

    def weight_shape(self, layer: str) -> Shape2D:
        """Return the shape that `read_weight` gives, without reading."""
        first, second = self.spec(f"{layer}.weight").shape
        return Shape2D(second, first) if self._is_transposed(layer) else Shape2D(first, second)

    def block_linears(self) -> Iterator[str]:
        """Yield the dotted names of all linears of the decoder blocks, in order of execution.

        Blocks need not be alike: some have experts, others don't.
        """
        for block in range(self.num_blocks):
            for name in (name for group in self.adapter.linears for name in group):
                layer = f"{self.adapter.blocks}.{block}.{name}"
                if self.has(f"{layer}.weight"):
                    yield layer

    def is_sensitive(self, layer: str) -> bool:
        """Return whether a linear of the blocks stays in 16 bit unless it is asked for by name."""
        depth = self.adapter.blocks.count(".") + 2
        return ".".join(layer.split(".")[depth:]) in self.adapter.sensitive

    def block_tensors(self) -> Iterator[str]:
        """Yield the full names of all tensors of the decoder blocks, without blocks beyond them."""
        blocks = {f"{self.adapter.blocks}.{block}" for block in range(self.num_blocks)}
        depth = self.adapter.blocks.count(".") + 2
        for name in self.names():
            if ".".join(name.split(".")[:depth]) in blocks:
                yield name

    def changed(self) -> tuple[str, ...]:
        """Return the full names of tensors that are read otherwise than they are stored: none."""
        return ()

    def companions(self) -> dict[str, bytes]:
        """Return the small files that belong to the model, by their path in its directory."""
        return read_companions(self.directory)

    def _is_transposed(self, layer: str) -> bool:
        in_blocks = layer.startswith(self.adapter.blocks + ".")
        return self.adapter.conv1d and in_blocks and expert_name(layer) is None

    def _full(self, stored: str) -> str:
        known = self.full_names.get(stored)
        if known is not None:
            return known
        return stored if stored.startswith(self.adapter.head + ".") else self.prefix + stored


def open_source(location: Location) -> ModelSource:
    """Open a model for quantization.

    Raises:
        ModelError: it isn't an unquantized causal language model that qtool can walk.
        CheckpointError: its files are missing or damaged, or aren't those of its configuration.
    """
    directory = location.directory
    config = read_config(directory)
    check_original(config, directory, families())
    shards = open_shards(directory)
    parsed = parse_config(config, directory)
    _check_count(parsed, shards, directory)
    skeleton = empty_model(parsed, directory)
    family = str(config["model_type"])
    apart = separated(skeleton)
    adapter = encoder_adapter(config) or known_adapter(apart, family)
    prefix = _missing_prefix(adapter, shards)
    num_blocks = _count_blocks(skeleton, adapter, shards, prefix, directory)
    aliases = match_names(skeleton, shards, directory)
    experts = find_experts(skeleton, shards, directory)
    names = {stored: name for name, stored in reversed(aliases.items())}
    tied = _is_tied(skeleton, aliases, shards)
    normalizes_after = getattr(parsed, "do_layer_norm_before", True) is False
    named = {**config, "tie_word_embeddings": tied}
    source = ModelSource(
        directory=directory,
        public_name=location.public_name,
        config=named,
        parsed=parse_config(named, directory) if named != config else parsed,
        adapter=adapter,
        shards=shards,
        prefix=prefix,
        aliases=aliases,
        full_names=names,
        joined=find_joined(skeleton, shards),
        plain=plain_weights(skeleton),
        num_blocks=num_blocks,
        num_positions=positions_of(parsed),
        residual=None if normalizes_after else adapter.residual,
        head_is_tied=tied,
        experts=experts,
    )
    _check_linears(source)
    return source


def _check_count(parsed: ModelConfig, shards: Shards, directory: Path) -> None:
    """Check that there are blocks, and no more than tensors: building them would take long."""
    wanted = getattr(parsed, "num_hidden_layers", None)
    if isinstance(wanted, int) and not 0 < wanted <= len(shards.specs):
        raise CheckpointError(
            f"{directory}: config.json names {wanted} blocks, and {len(shards.specs)} tensors are "
            "stored. config.json and weights don't belong together."
        )


def _missing_prefix(adapter: ModelAdapter, shards: Shards) -> str:
    """Return the prefix that stored names lack; '' if none, or if names differ by more than it."""
    if any(name.startswith(adapter.blocks + ".") for name in shards.specs):
        return ""
    prefix = adapter.base_prefix + "."
    short = adapter.blocks.removeprefix(prefix)
    return prefix if any(name.startswith(short + ".") for name in shards.specs) else ""


def _count_blocks(
    skeleton: CausalModel, adapter: ModelAdapter, shards: Shards, prefix: str, directory: Path
) -> int:
    """Return how many blocks the model has; blocks stored beyond them aren't the model's."""
    try:
        count = len(skeleton.get_submodule(adapter.blocks))
    except AttributeError:
        raise ModelError(
            f"{directory}: transformers builds no {adapter.blocks}, which the adapter names."
        ) from None
    start = adapter.blocks.removeprefix(prefix) + "."
    numbers = {
        name.removeprefix(start).split(".", 1)[0] for name in shards.specs if name.startswith(start)
    }
    missing = [str(block) for block in range(count) if str(block) not in numbers]
    if numbers and missing:
        raise CheckpointError(
            f"{directory}: config.json names {count} blocks, and no tensor of block "
            f"{list_names(missing)} is stored. Download it again."
        )
    return count


def _is_tied(skeleton: CausalModel, aliases: Mapping[str, str], shards: Shards) -> bool:
    """Return whether the head is the embedding: by class and configuration, and by the values.

    As transformers decides: 5.x ties nothing that is stored with different values, 4.57 ties
    whatever the values are.
    """
    head, embedding = skeleton.get_output_embeddings(), skeleton.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    looks_at_values = hasattr(skeleton, "get_expanded_tied_weights_keys")
    names = {
        aliases[name]
        for name, value in skeleton.named_parameters(remove_duplicate=False)
        if value is head.weight
    }
    if len(names) < 2 or not looks_at_values:  # noqa: PLR2004 - one of the two is stored
        return True
    first, *others = (shards.read(name) for name in sorted(names))
    return all(torch.equal(first, other) for other in others)


def _check_linears(source: ModelSource) -> None:
    """Check that what a recipe may quantize is there, as matrices of floats."""
    tables = [source.adapter.embedding, *([] if source.head_is_tied else [source.adapter.head])]
    linears = list(source.block_linears())
    named = [name for group in source.adapter.linears for name in group]
    nowhere = [name for name in named if not any(found.endswith("." + name) for found in linears)]
    absent = [f"{source.adapter.blocks}.0.{name}" for name in nowhere]
    for layer in (*tables, *absent, *linears):
        name = f"{layer}.weight"
        if not source.has(name):
            raise ModelError(
                f"{source.directory}: {name} is missing; the adapter of "
                f"{source.config.get('model_type')!r} expects it."
            )
        spec = source.spec(name)
        if spec.dtype not in FLOAT_DTYPES:
            raise ModelError(dtype_message(name, spec))
        if len(spec.shape) != 2 or not prod(spec.shape):  # noqa: PLR2004
            raise ModelError(f"{spec.file}: {name} has shape {spec.shape}, which is no matrix.")
