"""Quantized weights read from the files of a checkpoint, by docs/format.md and without qtool."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

Array = NDArray[Any]


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    """Return all tensors of a model's files, by name."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: values for file in files for name, values in load_file(file).items()}


def stored_weights(directory: Path) -> dict[str, Tensor]:
    """Return what each quantized layer means, (out_features, in_features) float32, by its name.

    A layer that shares another's parts isn't among them.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    layers, tensors = config["quantization_config"]["layers"], stored_tensors(directory)
    return {
        name: _weight(entry, name, tensors)
        for name, entry in layers.items()
        if "shared_with" not in entry
    }


def _weight(entry: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    scheme, (rows, columns) = entry["scheme"], entry["shape"]
    num_bits, by_column = scheme["num_bits"], scheme["group_dim"] == "out_features"

    def part(key: str) -> Array:
        values: Array = tensors[f"{name}.{key}"].numpy()
        return values.astype(np.float64) if values.dtype != np.int32 else values

    def spread(values: Array) -> Array:
        size = scheme["group_size"] or (rows if by_column else columns)
        wide = values.repeat(size, axis=0 if by_column else 1)
        return wide[:rows, :columns]

    if entry["format"] == "binary_coding":
        weight = sum(
            spread(scale) * (2 * plane - 1.0)
            for scale, plane in zip(
                part("plane_scales"), _bits(part("bit_planes"), columns), strict=True
            )
        )
        if not scheme["symmetric"]:
            weight = weight + spread(part("plane_offsets"))
    else:
        assert entry["format"] == "affine", entry["format"]
        zeros: Array = np.full_like(part("scales"), 2 ** (num_bits - 1))
        if not scheme["symmetric"]:
            zeros = _codes(part("zero_points"), columns if by_column else rows)
            zeros = zeros if by_column else zeros.T
        codes = _codes(part("codes"), columns)
        weight = spread(part("scales")) * (codes - spread(zeros))
    return torch.from_numpy(np.asarray(weight)).float()


def _bits(words: Array, count: int) -> Array:
    """Return (..., count) bits of (..., words) int32; bit 0 of word 0 comes first."""
    found = (words.view(np.uint32)[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    return found.reshape(*words.shape[:-1], -1)[..., :count].astype(np.float64)


def _codes(planes: Array, count: int) -> Array:
    """Return numbers, whose highest bits are in the first plane."""
    return np.asarray(
        sum(2.0 ** (len(planes) - 1 - i) * plane for i, plane in enumerate(_bits(planes, count)))
    )
