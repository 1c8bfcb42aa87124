"""Write GPTQ, and prove it with GPTQModel's own functions where these are installed."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.checkpoint.shards import open_shards
from qtool.exchange import Compared, Departure
from qtool.exchange._affine import foreign_grid
from qtool.exchange._compare import check_equal
from qtool.exchange._directory import COMPARING_FILES, told, write_directory
from qtool.exchange._gptq_peer import decode_gptq, peer_name
from qtool.exchange._gptq_rules import exactly
from qtool.exchange._words import pack_words, unpack_words
from qtool.exchange.dense import plain
from qtool.scheme import WeightScheme
from qtool.storage.plain_json import write_json_file

ONES: Mapping[int, int] = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""A one in each field of a word; adding it carries over from field to field, as GPTQModel does."""
SEPARATE = "quantize_config.json"


def fields(qzeros: Tensor, num_bits: int, outputs: int, version: int) -> Tensor:
    """Return zero points, (groups, outputs) uint8, of either version."""
    if version == 1 and num_bits in ONES:
        qzeros = qzeros + torch.tensor(ONES[num_bits], dtype=torch.int32)
    zeros = unpack_words(qzeros.contiguous(), num_bits, outputs)
    if version == 1 and num_bits not in ONES:
        return (zeros + 1) % 2**num_bits
    return zeros


def packed_layer(name: str, tensor: QuantizedTensor, version: int) -> dict[str, Tensor]:
    """Return the tensors of a layer by full name."""
    grid = foreign_grid(tensor)
    inputs = grid.codes.shape[1]
    codes, size = grid.codes, grid.group_size or inputs
    g_idx = torch.arange(inputs, dtype=torch.int32) // size
    if grid.order is not None:
        back = grid.order.argsort()
        codes, g_idx = codes[:, back], g_idx[back]
    zeros = grid.zeros.T.contiguous()
    stored_zeros = zeros if version != 1 else zeros - 1
    parts = {
        "qweight": pack_words(codes, grid.num_bits).T.contiguous(),
        "qzeros": pack_words(stored_zeros, grid.num_bits),
        "scales": grid.scales.T.contiguous(),
        "g_idx": g_idx,
    }
    return {f"{name}.{part}": values for part, values in parts.items()}


def version_of(departure: Departure) -> int:
    """Return the oldest layout that says all zero points: the first has none that are 0."""
    entries = departure.checkpoint.manifest.layers.values()
    return 1 if all(entry.scheme.symmetric for entry in entries) else 2


def _layers(departure: Departure) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    version, checkpoint = version_of(departure), departure.checkpoint
    for name in checkpoint.names():
        if name in checkpoint.manifest.layers:
            tensor = checkpoint.load(name)
            assert isinstance(tensor, QuantizedTensor)
            yield name, packed_layer(name, tensor, version)
        else:
            yield name, {name: plain(departure, name)}


def write_gptq(departure: Departure, directory: Path) -> None:
    """Write a directory; `quantization_config` lies in a file of its own, too, as it used to."""
    section = _section(departure)
    write_directory(departure, directory, _layers(departure), section)
    write_json_file(directory / SEPARATE, section)


def _section(departure: Departure) -> dict[str, Any]:
    """Return `quantization_config`: what most layers have, and rules for all others."""
    layers = departure.checkpoint.manifest.layers
    usual = Counter(entry.scheme for entry in layers.values()).most_common(1)[0][0]
    version = version_of(departure)
    ordered = any("input_order" in entry.layout() for entry in layers.values())
    section: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        **_numbers(usual),
        "desc_act": ordered,
        "lm_head": "head" in departure.places.values(),
        "pack_dtype": "int32",
        "modules_in_block_to_quantize": [_modules(departure)],
        "meta": {"quantizer": [f"qtool:{departure.checkpoint.manifest.tool_version}"]},
    }
    others = {
        exactly(name): _numbers(entry.scheme)
        for name, entry in layers.items()
        if entry.scheme != usual
    }
    return {**section, "dynamic": others} if others else section


def _numbers(scheme: WeightScheme) -> dict[str, Any]:
    size = -1 if scheme.group_size is None else scheme.group_size
    return {"bits": scheme.num_bits, "group_size": size, "sym": scheme.symmetric}


def _modules(departure: Departure) -> list[str]:
    """Return the linears of a block where all blocks have the same, else full names."""
    names = [name for name, place in departure.places.items() if place == "block"]
    inside: dict[str, set[str]] = {}
    for name in names:
        before, number, after = _cut(name)
        inside.setdefault(f"{before}.{number}", set()).add(after)
    if len(set(map(frozenset, inside.values()))) == 1:
        return list(dict.fromkeys(_cut(name)[2] for name in names))
    return names


def _cut(name: str) -> tuple[str, str, str]:
    """Return what is before a block's number, the number, and what is after it."""
    parts = name.split(".")
    at = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[:at]), parts[at], ".".join(parts[at + 1 :])


def compare_gptq(departure: Departure, directory: Path) -> Compared:
    """Compare what was stored, and what GPTQModel decodes it to."""
    shards, version, checkpoint = (
        open_shards(directory),
        version_of(departure),
        departure.checkpoint,
    )
    layers = 0
    for name, tensors in told(departure, _layers(departure), COMPARING_FILES):
        for full, expected in tensors.items():
            check_equal(directory, full, shards.read(full), expected)
        if name not in checkpoint.manifest.layers:
            continue
        layers += 1
        tensor = checkpoint.load(name)
        assert isinstance(tensor, QuantizedTensor)
        parts = {full.rpartition(".")[2]: shards.read(full) for full in tensors}
        found = decode_gptq(parts, tensor, version)
        if found is not None:
            expected = codec(tensor.format).dequantize(tensor, torch.float32)
            check_equal(directory, name, found, expected)
    others = len(list(checkpoint.names())) - layers
    return Compared(layers=layers, tensors=others, by=peer_name())
