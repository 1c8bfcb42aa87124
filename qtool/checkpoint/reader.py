"""CheckpointReader: lazy, checked reading of a quantized checkpoint.

The checks are functions of a manifest and of headers, so that whoever loads a checkpoint in another
way, as transformers does, goes through them as well.
"""

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from math import isfinite, isinf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qtool.formats
from qtool import plugins
from qtool.base import Emit, PartSpec, Progress, QuantizedTensor, ignore_events
from qtool.checkpoint.manifest import LayerEntry, Manifest, codec, manifest_from_config
from qtool.checkpoint.old_records import check_old_record
from qtool.checkpoint.shards import Shards, TensorSpec, open_shards, read_json
from qtool.core.packing import octets_of, planes_to_codes
from qtool.errors import CheckpointError, SchemeError
from qtool.formats._dtypes import stored_name
from qtool.scheme import MAX_BITS, BitCode, Shape2D, WeightScheme
from qtool.wording import list_names, shown

AGAIN = "Copy the checkpoint again."


class CheckpointReader:
    """A finished checkpoint; opening it checks every header, reads no weights."""

    def __init__(self, directory: Path) -> None:
        """Open a checkpoint.

        Raises:
            CheckpointError: it is missing, incomplete, damaged, or not qtool's.
        """
        if not os.path.isdir(directory):  # noqa: PTH112 - says no to what can't be a path
            raise CheckpointError(
                f"No checkpoint directory {directory}. Give one that `qtool quantize` or `qtool "
                "import` has written."
            )
        self.directory = directory
        self.config: dict[str, Any] = read_json(directory / "config.json")
        check_old_record(directory, self.config)
        if self.config.get("quantization_config") in (None, {}):
            has = "an empty" if self.config.get("quantization_config") == {} else "no"
            raise CheckpointError(
                f"{directory} isn't quantized: config.json has {has} quantization_config. "
                "`qtool quantize` makes a checkpoint of it."
            )
        where = str(directory / "config.json")
        self.manifest: Manifest = manifest_from_config(self.config["quantization_config"], where)
        self._shards: Shards = open_shards(directory)
        check_headers(self.manifest, self._shards.specs, str(directory))

    def plain_config(self) -> dict[str, Any]:
        """Return config.json as if the model weren't quantized."""
        return {key: value for key, value in self.config.items() if key != "quantization_config"}

    def names(self) -> Iterator[str]:
        """Yield the names of the quantized layers, then of all other tensors."""
        yield from self.manifest.layers
        owned = {
            f"{name}.{part}"
            for name, entry in self.manifest.layers.items()
            for part in entry.layout()
        }
        yield from (name for name in self._shards.specs if name not in owned)

    def spec(self, name: str) -> TensorSpec:
        """Return dtype and shape of a stored tensor, by its full name."""
        return self._shards.specs[name]

    def load(self, name: str) -> QuantizedTensor | Tensor:
        """Return a quantized layer by its dotted name, or another tensor by its full name.

        Raises:
            CheckpointError: a file has become unreadable, or scales aren't numbers that scale.
        """
        entry = self.manifest.layers.get(name)
        if entry is None:
            return self._shards.read(name)
        owner = entry.shared_with or name
        parts = {}
        for part, spec in self.manifest.layers[owner].layout().items():
            parts[part] = self._shards.read(f"{owner}.{part}")
            check_values(f"{owner}.{part}", spec, parts[part])
        return QuantizedTensor(entry.format, entry.scheme, entry.shape, parts)

    def verify(self, emit: Emit = ignore_events) -> int:
        """Read every tensor, compare its digest, and return how many there are.

        `emit` is told of each.

        Raises:
            CheckpointError: no digests were noted, or tensors differ, are missing or too many.
        """
        digests, stored = self.manifest.digests, self._shards.specs.keys()
        if not digests:
            raise CheckpointError(
                f"{self.directory} has no digests to compare: another program, or transformers, "
                "wrote it. Quantize the original again to have some."
            )
        damaged = sorted(digests.keys() ^ stored)
        both = sorted(digests.keys() & stored)
        for done, name in enumerate(both):
            emit(Progress(f"reading {self.directory}", done, len(both), name))
            if tensor_digest(self._shards.read(name)) != digests[name]:
                damaged.append(name)
        if damaged:
            verb = "isn't" if len(damaged) == 1 else "aren't"
            raise CheckpointError(
                f"{self.directory}: {list_names(damaged)} {verb} what was written. {AGAIN}"
            )
        return len(stored)

    def weight_bytes(self) -> int:
        """Return the size of all weight files."""
        return self._shards.num_bytes()


def tensor_digest(tensor: Tensor) -> str:
    """Return the sha256, in hex, of a tensor's bytes as safetensors stores them."""
    octets = octets_of(tensor.detach().cpu().flatten())
    return hashlib.sha256(octets.numpy().data).hexdigest()


def check_headers(manifest: Manifest, specs: Mapping[str, TensorSpec], where: str) -> None:
    """Compare a manifest with the headers of the files, by tensor name.

    Raises:
        CheckpointError: a part is missing, has another dtype or shape, or belongs to no layer.
    """
    for name, entry in manifest.layers.items():
        _check_shared(manifest, name, entry, where)
        for part, spec in entry.layout().items():
            _check_part(f"{name}.{part}", spec, specs, where)
    packed, known = _part_names()
    for full, stored in specs.items():
        name, _, part = full.rpartition(".")
        found = manifest.layers.get(name)
        if found is None and part in packed and stored.dtype == stored_name("int32"):
            raise CheckpointError(
                f"{where}: {shown(full)} belongs to a quantized layer that config.json doesn't "
                f"name. {AGAIN}"
            )
        if found is not None and part in known and part not in found.layout():
            raise CheckpointError(
                f"{where}: {shown(full)} is no part of a layer that is stored as config.json "
                f"says. {AGAIN}"
            )


def _check_shared(manifest: Manifest, name: str, entry: LayerEntry, where: str) -> None:
    if entry.shared_with is not None:
        owner = manifest.layers.get(entry.shared_with)
        if owner != replace(entry, shared_with=None, method=owner.method if owner else ""):
            raise CheckpointError(
                f"{where}: {shown(name)} shares the parts of {shown(entry.shared_with)}, which "
                "isn't there or is stored in another way."
            )


def _check_part(name: str, spec: PartSpec, specs: Mapping[str, TensorSpec], where: str) -> None:
    stored = specs.get(name)
    if stored is None:
        raise CheckpointError(f"{where}: tensor {shown(name)} is missing. {AGAIN}")
    expected = (stored_name(spec.dtype), spec.shape)
    if (stored.dtype, stored.shape) != expected:
        raise CheckpointError(
            f"{stored.file}: {shown(name)} is {stored.dtype} {stored.shape}; "
            f"its scheme needs {expected[0]} {expected[1]}."
        )


@cache
def _part_names() -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of the packed parts of all formats, and of all that a layer may have."""
    rows = tuple((num_bits, 1) for num_bits in range(MAX_BITS, 0, -1))
    kinds = [
        (WeightScheme(num_bits=2), Shape2D(1, 1)),
        (WeightScheme(num_bits=MAX_BITS, rows=rows), Shape2D(MAX_BITS, 1)),
    ]
    inputs = BitCode(num_inputs=1, num_outputs=1)
    codes = inputs, replace(inputs, registers=1, kept=1, corrections=1)
    encoded = (WeightScheme(num_bits=2, symmetric=True, code=code) for code in codes)
    kinds.extend((scheme, Shape2D(1, 1)) for scheme in encoded)
    layouts = []
    for (scheme, shape), name in itertools.product(kinds, plugins.names(qtool.formats)):
        with contextlib.suppress(SchemeError):  # not all have classes of rows, or codes
            layouts.append(codec(name).layout(scheme, shape))
    packed = {n for parts in layouts for n, spec in parts.items() if spec.dtype == "int32"}
    # A plain weight beside them is what the layer was before it was quantized.
    return frozenset(packed), frozenset({"weight"}.union(*layouts))


def check_values(name: str, spec: PartSpec, values: Tensor) -> None:
    """Refuse what no writer stores: scales and offsets that aren't finite, or scales below zero.

    And classes of rows, or of kept weights, that aren't as large as their scheme says, and orders
    that are none.

    Raises:
        CheckpointError: a value is outside.
    """
    if spec.counts:
        _check_counts(name, spec.counts, values)
    if spec.is_order and not torch.equal(values.sort().values.long(), torch.arange(len(values))):
        raise CheckpointError(
            f"{name} isn't an order: each number from 0 to {len(values) - 1} is meant to be there "
            f"once. {AGAIN}"
        )
    if not values.is_floating_point() or values.numel() == 0:
        return
    lowest, highest = (float(value) for value in values.aminmax())  # NaN if any is
    if not (isfinite(lowest) and isfinite(highest) and lowest >= spec.lowest):
        allowed = "finite ones" if isinf(spec.lowest) else f"finite ones from {spec.lowest:g} on"
        raise CheckpointError(
            f"{name} holds values from {lowest:g} to {highest:g}; {allowed} are meant. {AGAIN}"
        )


def _check_counts(name: str, counts: tuple[int, ...], values: Tensor) -> None:
    found = planes_to_codes(values.unsqueeze(1), sum(counts)).flatten().bincount()
    if found.tolist() != list(counts):
        raise CheckpointError(
            f"{name} has {found.tolist()} of its numbers, from 0 on; {list(counts)} are meant. "
            f"{AGAIN}"
        )
