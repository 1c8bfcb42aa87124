"""Manifest: what `quantization_config` in config.json says. docs/format.md, section 2."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import qtool.formats
from qtool import plugins
from qtool.base import Codec, PartSpec
from qtool.errors import CheckpointError, QtoolError
from qtool.scheme import Shape2D, WeightScheme

FORMAT_VERSION = 1
QUANT_METHOD = "qtool"
DTYPE_BYTES = {"int32": 4, "float16": 2, "bfloat16": 2, "float32": 4}


def codec(format_name: str) -> Codec:
    """Return the codec of a format."""
    return plugins.load(qtool.formats, format_name, "CODEC", Codec)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerEntry:
    """How one layer is stored."""

    format: str
    scheme: WeightScheme
    shape: Shape2D
    method: str
    shared_with: str | None = None
    """Name of the layer whose parts this one uses: a head tied to its embedding."""

    def layout(self) -> Mapping[str, PartSpec]:
        """Return the specs of its stored parts; none if they are stored with another layer."""
        return {} if self.shared_with else codec(self.format).layout(self.scheme, self.shape)

    def num_bytes(self) -> int:
        """Return the stored size."""
        return sum(num_bytes(part) for part in self.layout().values())


def num_bytes(part: PartSpec) -> int:
    """Return the size of one part."""
    return prod(part.shape) * DTYPE_BYTES[part.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that a reader needs beside the model's own configuration."""

    tool_version: str
    recipe: Mapping[str, Any]
    layers: Mapping[str, LayerEntry]
    source: str | None = None
    """Hub id or demo name of the original; never a local path."""
    calibration: str | None = None
    """Digest of the calibration data."""
    format_version: int = FORMAT_VERSION
    digests: Mapping[str, str] = field(default_factory=dict)
    """sha256, in hex, of the bytes of each stored tensor by its name; empty: none were noted."""

    def average_bits(self) -> float:
        """Return stored bits per quantized weight, with scales and offsets."""
        entries = [entry for entry in self.layers.values() if entry.shared_with is None]
        weights = sum(prod(entry.shape) for entry in entries)
        return 8 * sum(entry.num_bytes() for entry in entries) / max(weights, 1)

    def to_config(self) -> dict[str, Any]:
        """Return the JSON form."""
        config = {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "tool_version": self.tool_version,
            "source": self.source,
            "calibration": self.calibration,
            "recipe": dict(self.recipe),
            "layers": {name: _entry_to_json(entry) for name, entry in self.layers.items()},
        }
        return {**config, "digests": dict(self.digests)} if self.digests else config


def _entry_to_json(entry: LayerEntry) -> dict[str, Any]:
    value: dict[str, Any] = {
        "format": entry.format,
        "codec_version": codec(entry.format).version,
        "method": entry.method,
        "shape": list(entry.shape),
        "scheme": asdict(entry.scheme),
    }
    return {**value, "shared_with": entry.shared_with} if entry.shared_with else value


def manifest_from_config(config: Mapping[str, Any], where: str) -> Manifest:
    """Parse `quantization_config`.

    Args:
        config: The JSON object.
        where: The file, for messages.

    Raises:
        CheckpointError: it isn't qtool's, is newer than this version, or is damaged.
    """
    if config.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{where}: quant_method is {config.get('quant_method')!r}, not 'qtool'."
        )
    version = config.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format_version is {version!r}; this qtool reads 1 to {FORMAT_VERSION}. "
            "Upgrade qtool."
        )
    try:
        layers = {name: _entry_from_json(value) for name, value in config["layers"].items()}
        return Manifest(
            tool_version=str(config["tool_version"]),
            recipe=config["recipe"],
            layers=layers,
            source=config.get("source"),
            calibration=config.get("calibration"),
            format_version=version,
            digests=dict(config.get("digests", {})),
        )
    except (KeyError, TypeError, AttributeError, ValueError, QtoolError) as error:
        raise CheckpointError(f"{where}: quantization_config is damaged: {error!r}.") from error


def _entry_from_json(value: Mapping[str, Any]) -> LayerEntry:
    sizes: list[Any] = value["shape"]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise CheckpointError(f"shape is {value['shape']}; two positive whole numbers are meant")
    entry = LayerEntry(
        format=value["format"],
        scheme=WeightScheme(**value["scheme"]),
        shape=Shape2D(*sizes),
        method=value["method"],
        shared_with=value.get("shared_with"),
    )
    known, stored = codec(entry.format).version, value["codec_version"]
    if type(stored) is not int or not 1 <= stored <= known:
        raise CheckpointError(f"codec {entry.format} is version {stored!r}, known 1 to {known}")
    return entry
