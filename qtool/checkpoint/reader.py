"""CheckpointReader: lazy, checked reading of a quantized checkpoint."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.checkpoint.manifest import LayerEntry, Manifest, manifest_from_config
from qtool.checkpoint.shards import Shards, open_shards, read_json
from qtool.errors import CheckpointError

SAFETENSORS_DTYPES = {"int32": "I32", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}


class CheckpointReader:
    """A finished checkpoint; opening it checks every header, reads no weights."""

    def __init__(self, directory: Path) -> None:
        """Open a checkpoint.

        Raises:
            CheckpointError: it is missing, incomplete, damaged, or not qtool's.
        """
        if not directory.is_dir():
            raise CheckpointError(f"No checkpoint directory {directory}.")
        self.directory = directory
        self.config: dict[str, Any] = read_json(directory / "config.json")
        if "quantization_config" not in self.config:
            raise CheckpointError(
                f"{directory} isn't quantized: config.json has no quantization_config."
            )
        where = str(directory / "config.json")
        self.manifest: Manifest = manifest_from_config(self.config["quantization_config"], where)
        self._shards: Shards = open_shards(directory)
        for name, entry in self.manifest.layers.items():
            self._check(name, entry)

    def _check(self, name: str, entry: LayerEntry) -> None:
        if entry.shared_with is not None:
            owner = self.manifest.layers.get(entry.shared_with)
            if owner != replace(entry, shared_with=None, method=owner.method if owner else ""):
                raise CheckpointError(
                    f"{self.directory}: {name} shares the parts of {entry.shared_with}, which "
                    "isn't there or is stored in another way."
                )
        for part, spec in entry.layout().items():
            stored = self._shards.specs.get(f"{name}.{part}")
            if stored is None:
                raise CheckpointError(f"{self.directory}: tensor {name}.{part} is missing.")
            expected = (SAFETENSORS_DTYPES[spec.dtype], spec.shape)
            if (stored.dtype, stored.shape) != expected:
                raise CheckpointError(
                    f"{stored.file}: {name}.{part} is {stored.dtype} {stored.shape}; "
                    f"its scheme needs {expected[0]} {expected[1]}."
                )

    def names(self) -> Iterator[str]:
        """Yield the names of the quantized layers, then of all other tensors."""
        yield from self.manifest.layers
        owned = {
            f"{name}.{part}"
            for name, entry in self.manifest.layers.items()
            for part in entry.layout()
        }
        yield from (name for name in self._shards.specs if name not in owned)

    def load(self, name: str) -> QuantizedTensor | Tensor:
        """Return a quantized layer by its dotted name, or another tensor by its full name."""
        entry = self.manifest.layers.get(name)
        if entry is None:
            return self._shards.read(name)
        owner = entry.shared_with or name
        parts = {
            part: self._shards.read(f"{owner}.{part}")
            for part in self.manifest.layers[owner].layout()
        }
        return QuantizedTensor(entry.format, entry.scheme, entry.shape, parts)

    def weight_bytes(self) -> int:
        """Return the size of all weight files."""
        files = {spec.file for spec in self._shards.specs.values()}
        return sum(file.stat().st_size for file in files)
