"""What a GGUF file of a checkpoint will have: metadata and tensors, or why it can't be written.

A tensor that has no codes stays in its dtype, unless another is asked for; norms and biases are
float32, which llama.cpp wants.
"""

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.core.packing import octets_of
from qtool.exchange import Departure
from qtool.exchange._gguf_encode import encode, type_of, type_without_zero_points
from qtool.exchange._gguf_file import GGML_FLOATS, GGML_TYPES, GGUF_ALIGNMENT, GgmlType
from qtool.exchange._gguf_model import (
    DescribedModel,
    described,
    model_metadata,
    model_types,
    rope_factors,
    why_computed_otherwise,
)
from qtool.exchange._gguf_names import GGUF_TABLES, tensors_of, to_pairs
from qtool.exchange._gguf_tokens import tokenizer_metadata, why_no_tokenizer
from qtool.formats._dtypes import dtype_of
from qtool.formats.affine import AFFINE
from qtool.wording import list_names, shown

TYPES_BY_NAME = {kind.name: kind for kind in GGML_TYPES.values()}
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10,
    "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "BF16": 32,
}  # fmt: skip
"""llama.cpp's number (`LLAMA_FTYPE_MOSTLY_`) for a file most of whose weights have a type."""
QUANTIZATION_VERSION = 2
WEIGHT_SUFFIX = ".weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """One that will be in the file."""

    name: str
    """The file's."""
    source: str
    """The checkpoint's: of a layer, or in full."""
    shape: tuple[int, ...]
    type: GgmlType
    heads: int | None
    """Into how many heads rows are cut that llama.cpp has in another order."""

    @property
    def row_bytes(self) -> int:
        """Return the stored size of a row."""
        return self.shape[-1] // self.type.block_size * self.type.block_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufPlan:
    """All of a file but its tensors' content."""

    architecture: str
    metadata: dict[str, Any]
    tensors: tuple[PlannedTensor, ...]
    factors: Tensor | None
    """Of scaled positions."""


def why_no_file(departure: Departure) -> str | None:
    """Return why a model can't be written, as a sentence; None: it can."""
    config = departure.checkpoint.config
    model = described(departure.parsed)
    if model is None:
        kind = shown(departure.parsed.model_type)
        return f"gguf can't say a model of type {kind}; it can say {', '.join(model_types())}."
    clause = (
        why_computed_otherwise(model)
        or _why_other_tensors(departure, model)
        or why_no_tokenizer(departure.files, config, model.sizes.vocabulary)
    )
    return None if clause is None else f"gguf can't say this model: {clause}."


def _why_other_tensors(departure: Departure, model: DescribedModel) -> str | None:
    """Return which tensors have no name or another shape, as a clause."""
    wanted = {each.full: each for each in tensors_of(model.architecture, model.sizes)}
    found = _shapes(departure)
    unknown = sorted(found.keys() - wanted.keys())
    if unknown:
        return f"llama.cpp has no name for {list_names(unknown)}"
    missing = [name for name, each in wanted.items() if each.is_required and name not in found]
    if missing:
        return f"llama.cpp needs {list_names(missing)}"
    other = [name for name, shape in found.items() if shape != wanted[name].shape]
    return f"config.json has other shapes for {list_names(other)}" if other else None


def _shapes(departure: Departure) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors that are stored, by full name."""
    checkpoint = departure.checkpoint
    found: dict[str, tuple[int, ...]] = {}
    for name in checkpoint.names():
        entry = checkpoint.manifest.layers.get(name)
        if entry is None:
            found[name] = tuple(checkpoint.spec(name).shape)
        elif entry.shared_with is None:
            found[f"{name}{WEIGHT_SUFFIX}"] = tuple(entry.shape)
    return found


def plan_file(departure: Departure) -> GgufPlan:
    """Return what will be in a file; `why_no_file` has been asked.

    Reads no tensors but those that may do without their zero points.
    """
    model = described(departure.parsed)
    assert model is not None
    tensors = _tensors(departure, model)
    metadata = {
        **_general(departure, tensors),
        **model_metadata(model),
        **tokenizer_metadata(departure.files, departure.checkpoint.config, model.sizes.vocabulary),
    }
    return GgufPlan(
        architecture=model.name, metadata=metadata, tensors=tensors, factors=rope_factors(model)
    )


def _tensors(departure: Departure, model: DescribedModel) -> tuple[PlannedTensor, ...]:
    shapes, layers = _shapes(departure), departure.checkpoint.manifest.layers
    found = []
    for each in tensors_of(model.architecture, model.sizes):
        if each.full in shapes:
            layer = each.full.removesuffix(WEIGHT_SUFFIX)
            of_layer = layer in layers
            kind = _layer_type(departure, layer) if of_layer else _plain_type(departure, each.full)
            heads = model.sizes.heads_of(each.gguf) if model.architecture.is_permuted else None
            found.append(
                PlannedTensor(
                    name=each.gguf,
                    source=layer if of_layer else each.full,
                    shape=each.shape,
                    type=TYPES_BY_NAME[kind],
                    heads=heads,
                )
            )
    return tuple(found)


def _plain_type(departure: Departure, full: str) -> str:
    """Return the type of a tensor that has no codes."""
    spec = departure.checkpoint.spec(full)
    if len(spec.shape) == 1:
        return "F32"
    if spec.dtype in GGML_FLOATS and not departure.is_dtype_asked:
        return spec.dtype
    wanted = dtype_of(departure.dtype)
    return next(name for name, dtype in GGML_FLOATS.items() if dtype == wanted)


def _layer_type(departure: Departure, layer: str) -> str:
    entry = departure.checkpoint.manifest.layers[layer]
    usual = type_of(entry)
    if entry.scheme.symmetric or entry.format != AFFINE:
        return usual
    tensor = departure.checkpoint.load(layer)
    assert isinstance(tensor, QuantizedTensor)
    return type_without_zero_points(tensor) or usual


def _general(departure: Departure, tensors: tuple[PlannedTensor, ...]) -> dict[str, Any]:
    config, weights = departure.checkpoint.config, Counter[str]()
    for each in tensors:
        if each.name not in GGUF_TABLES and len(each.shape) > 1:
            weights[each.type.name] += prod(each.shape)
    name = config.get("_name_or_path") or config.get("_model_name_or_path")
    return {
        "general.type": "model",
        **({"general.name": name} if isinstance(name, str) and name else {}),
        "general.alignment": GGUF_ALIGNMENT,
        "general.file_type": FILE_TYPES[weights.most_common(1)[0][0]],
        "general.quantization_version": QUANTIZATION_VERSION,
    }


def content_of(departure: Departure, planned: PlannedTensor) -> Tensor:
    """Return the bytes of a tensor: (rows, row_bytes) uint8, or (row_bytes,) of a vector."""
    loaded = departure.checkpoint.load(planned.source)
    if isinstance(loaded, QuantizedTensor):
        stored = encode(loaded, planned.type.name)
        return stored[to_pairs(len(stored), planned.heads)] if planned.heads else stored
    values = loaded.to(GGML_FLOATS[planned.type.name])
    return octets_of(_in_file_order(values, planned))


def meant_values(departure: Departure, planned: PlannedTensor) -> Tensor:
    """Return what a tensor of the file must mean: float32, in the order of the file."""
    loaded = departure.checkpoint.load(planned.source)
    if isinstance(loaded, QuantizedTensor):
        return _in_file_order(codec(loaded.format).dequantize(loaded, torch.float32), planned)
    return _in_file_order(loaded.to(GGML_FLOATS[planned.type.name]).float(), planned)


def _in_file_order(values: Tensor, planned: PlannedTensor) -> Tensor:
    return values[to_pairs(len(values), planned.heads)] if planned.heads else values
