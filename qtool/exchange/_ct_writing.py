"""Write compressed-tensors, and prove it with its own functions where these are installed."""

import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.checkpoint.manifest import LayerEntry, codec
from qtool.checkpoint.shards import open_shards
from qtool.exchange import Compared, Departure
from qtool.exchange._affine import foreign_grid
from qtool.exchange._compare import OWN_READER, check_equal
from qtool.exchange._ct_config import (
    IN_BYTES,
    IN_WORDS,
    SEVERAL_FORMATS,
    inputs_config,
    weights_config,
)
from qtool.exchange._directory import COMPARING_FILES, told, write_directory
from qtool.exchange._words import pack_words
from qtool.exchange.dense import plain
from qtool.scheme import ActivationScheme

LAYOUT_VERSION = "0.18.0"
"""Since then codes of 3, 5, 6 and 7 bits run on from word to word."""
CT_LIBRARY = "compressed_tensors"
BYTE_BITS = 8


def is_usual(activation: ActivationScheme) -> bool:
    """Return whether inputs are quantized as the format says it: 8 bits, a step per token."""
    return activation == ActivationScheme()


def refuses_ct(departure: Departure) -> str | None:
    """Return why a model can't be written, or None."""
    if departure.transposed:
        return "compressed-tensors knows no Conv1D, as GPT-2 has it."
    return None


def _is_whole(entry: LayerEntry) -> bool:
    """Return whether codes are stored as bytes: as engines want it where inputs are bytes, too."""
    scheme = entry.scheme
    per_row = scheme.num_bits == BYTE_BITS and scheme.group_size is None
    return entry.activation is not None and per_row


def packed_ct(name: str, tensor: QuantizedTensor, entry: LayerEntry) -> dict[str, Tensor]:
    """Return the tensors of a layer by full name."""
    grid, half = foreign_grid(tensor), 2 ** (entry.scheme.num_bits - 1)
    parts = {"weight_scale": grid.scales}
    if _is_whole(entry):
        parts["weight"] = (grid.codes.to(torch.int16) - half).to(torch.int8)
        if not entry.scheme.symmetric:
            parts["weight_zero_point"] = (grid.zeros.to(torch.int16) - half).to(torch.int8)
    else:
        parts["weight_packed"] = pack_words(grid.codes, grid.num_bits)
        parts["weight_shape"] = torch.tensor(tuple(tensor.shape), dtype=torch.int64)
        if not entry.scheme.symmetric:
            along_outputs = grid.zeros.T.contiguous()
            words = pack_words(along_outputs, grid.num_bits)
            parts["weight_zero_point"] = words.T.contiguous()
    return {f"{name}.{part}": values for part, values in parts.items()}


def _layers(departure: Departure) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    checkpoint = departure.checkpoint
    for name in checkpoint.names():
        entry = checkpoint.manifest.layers.get(name)
        if entry is None:
            yield name, {name: plain(departure, name)}
        else:
            tensor = checkpoint.load(name)
            assert isinstance(tensor, QuantizedTensor)
            yield name, packed_ct(name, tensor, entry)


def write_ct(departure: Departure, directory: Path) -> None:
    """Write a directory."""
    write_directory(departure, directory, _layers(departure), _section(departure))


def _section(departure: Departure) -> dict[str, Any]:
    """Return `quantization_config`: a group for each kind of layer."""
    layers = departure.checkpoint.manifest.layers
    kinds: dict[Any, list[str]] = {}
    for name, entry in layers.items():
        kinds.setdefault((entry.scheme, entry.activation), []).append(name)
    groups, formats = {}, set()
    for number, names in enumerate(kinds.values()):
        value = ct_group(layers[names[0]], ["Linear"] if len(kinds) == 1 else names)
        groups[f"group_{number}"] = value
        formats.add(value["format"])
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else SEVERAL_FORMATS,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in departure.linears if name not in layers],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": LAYOUT_VERSION,
    }


def ct_group(entry: LayerEntry, targets: list[str]) -> dict[str, Any]:
    scheme = entry.scheme
    return {
        "targets": targets,
        "weights": weights_config(scheme.num_bits, scheme.group_size, symmetric=scheme.symmetric),
        "input_activations": None if entry.activation is None else inputs_config(),
        "output_activations": None,
        "format": IN_BYTES[0] if _is_whole(entry) else IN_WORDS,
    }


@cache
def _peer() -> tuple[Any, ...] | None:
    """Return compressed-tensors' decoders, packed and whole, and its scheme; None: not there."""
    if importlib.util.find_spec(CT_LIBRARY) is None:
        return None
    try:
        from compressed_tensors.compressors import (
            IntQuantizationCompressor,
            PackedQuantizationCompressor,
        )
        from compressed_tensors.quantization import QuantizationScheme
    except Exception:  # noqa: BLE001 - it needs other libraries
        return None
    return PackedQuantizationCompressor, IntQuantizationCompressor, QuantizationScheme


def decode_ct(parts: Mapping[str, Tensor], entry: LayerEntry) -> Tensor | None:
    """Return a layer as compressed-tensors decodes it, float32; None: it isn't installed."""
    found = _peer()
    if found is None:
        return None
    packed, whole, scheme = found
    group = scheme.model_validate(ct_group(entry, ["Linear"]))
    state = {n: v.float() if v.is_floating_point() else v for n, v in parts.items()}
    decoder = whole if _is_whole(entry) else packed
    return decoder.decompress(state, group)["weight"]


def compare_ct(departure: Departure, directory: Path) -> Compared:
    """Compare what was stored, and what compressed-tensors decodes it to."""
    shards, checkpoint, layers = open_shards(directory), departure.checkpoint, 0
    for name, tensors in told(departure, _layers(departure), COMPARING_FILES):
        for full, expected in tensors.items():
            check_equal(directory, full, shards.read(full), expected)
        entry = checkpoint.manifest.layers.get(name)
        if entry is None:
            continue
        layers += 1
        tensor = checkpoint.load(name)
        assert isinstance(tensor, QuantizedTensor)
        found = decode_ct({full.rpartition(".")[2]: shards.read(full) for full in tensors}, entry)
        if found is not None:
            exact = codec(tensor.format).dequantize(tensor, torch.float32)
            check_equal(directory, name, found, exact)
    by = f"compressed-tensors {importlib.metadata.version(CT_LIBRARY)}" if _peer() else OWN_READER
    return Compared(layers=layers, tensors=len(list(checkpoint.names())) - layers, by=by)
