"""Manifest: what `quantization_config` in config.json says. docs/format.md, section 2."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import isfinite, prod
from types import NoneType
from typing import Any

import qtool.formats
from qtool import plugins
from qtool.base import Codec, PartSpec
from qtool.checkpoint.marks import our_section
from qtool.core.experts import expert_name
from qtool.errors import CheckpointError, QtoolError
from qtool.formats._dtypes import dtype_of
from qtool.scheme import ActivationScheme, BitCode, Shape2D, WeightScheme
from qtool.storage.plain_json import JsonValue, leaves
from qtool.wording import quoted, shown

FORMAT_VERSION = 3
"""The newest. Version 2 has layers whose inputs are quantized, version 3 those of single experts;
all else is written as version 1."""
NEW = {2: "whose inputs are quantized", 3: "of single experts"}
"""What layers came with a version."""
QUANT_METHOD = "qtool"
ROWS, BIT_CODE = "rows", "code"
"""Keys of a scheme that only formats with classes of rows have, or with networks of XOR gates."""
MAX_SIZE = 2**31 - 1
"""Of a dimension or a group: what 32 bits hold."""
JSON_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number with a decimal point",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    NoneType: "null",
}


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
    activation: ActivationScheme | None = None
    """How the inputs are quantized while the layer runs; None: they aren't."""
    tokens_from: str | None = None
    """Of an expert that got few calibration tokens, which it was solved for; None: its own."""

    def layout(self) -> Mapping[str, PartSpec]:
        """Return the specs of its stored parts; none if they are stored with another layer."""
        return {} if self.shared_with else codec(self.format).layout(self.scheme, self.shape)

    def num_bytes(self) -> int:
        """Return the stored size."""
        return sum(num_bytes(part) for part in self.layout().values())


def num_bytes(part: PartSpec) -> int:
    """Return the size of one part."""
    return prod(part.shape) * dtype_of(part.dtype).itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that a reader needs beside the model's own configuration."""

    tool_version: str
    source: str | None = None
    """Hub id or demo name of the original; never a local path."""
    calibration: str | None = None
    """Digest of the calibration data."""
    recipe: Mapping[str, Any]
    layers: Mapping[str, LayerEntry]
    unquantized: Mapping[str, str] = field(default_factory=dict)
    """Why each weight of two dimensions and more that no layer here is stays as it was, by name;
    empty: nobody noted it."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """sha256, in hex, of the bytes of each stored tensor by its name; empty: none were noted."""

    @property
    def format_version(self) -> int:
        """Return the oldest version that can say what is here."""
        if any(expert_name(name) for name in self.layers):
            return 3
        return 2 if any(entry.activation for entry in self.layers.values()) else 1

    def average_bits(self) -> float:
        """Return stored bits per quantized weight, with scales and offsets."""
        entries = [entry for entry in self.layers.values() if entry.shared_with is None]
        weights = sum(prod(entry.shape) for entry in entries)
        return 8 * sum(entry.num_bytes() for entry in entries) / max(weights, 1)

    def to_config(self) -> dict[str, Any]:
        """Return the JSON form."""
        versions = {"quant_method": QUANT_METHOD, "format_version": self.format_version}
        config = {**versions, **asdict(self)}
        config["layers"] = {name: _entry_to_json(entry) for name, entry in self.layers.items()}
        for key in ("unquantized", "digests"):
            if not config[key]:
                del config[key]
        return config


def _entry_to_json(entry: LayerEntry) -> dict[str, Any]:
    value: dict[str, Any] = {
        "format": entry.format,
        "codec_version": codec(entry.format).version,
        "method": entry.method,
        "shape": list(entry.shape),
        "scheme": entry.scheme.to_json(),
    }
    if entry.shared_with:
        value["shared_with"] = entry.shared_with
    if entry.activation:
        value["activation"] = entry.activation.to_json()
    if entry.tokens_from:
        value["tokens_from"] = entry.tokens_from
    return value


def manifest_from_config(config: object, where: str) -> Manifest:
    """Parse `quantization_config` of a file. A value of another type than the format's is refused.

    Raises:
        CheckpointError: it isn't qtool's, is newer than this version, or is damaged.
    """
    config = our_section(config, where)
    version = config.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format_version is {quoted(version)}; this qtool reads 1 to "
            f"{FORMAT_VERSION}. Upgrade qtool."
        )
    try:
        manifest = Manifest(
            tool_version=_value(config, "tool_version", str),
            recipe=_finite(_value(config, "recipe", dict)),
            layers={
                name: _entry_from_json(name, value)
                for name, value in _value(config, "layers", dict).items()
            },
            source=_value(config, "source", str, NoneType),
            calibration=_value(config, "calibration", str, NoneType),
            unquantized=_texts(config, "unquantized", "names of tensors to reasons"),
            digests=_texts(config, "digests", "names of tensors to text"),
        )
        if manifest.format_version > version:
            new = NEW[manifest.format_version]
            raise CheckpointError(f"version {version} of the format has no layers {new}")
    except CheckpointError as error:
        raise CheckpointError(
            f"{where}: quantization_config is damaged: {error}. Copy the checkpoint again."
        ) from error
    return manifest


def _finite(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe, which nobody else checks, if other programs can read its numbers."""
    for where, value in leaves(recipe):
        if isinstance(value, float) and not isfinite(value):
            raise CheckpointError(f"recipe.{shown(where)} is {value}; JSON has finite numbers only")
    return recipe


def _entry_from_json(name: str, value: object) -> LayerEntry:
    """Parse one entry; the message begins with the layer and ends without a full stop."""
    if not name or not name.isprintable():
        raise CheckpointError(f"{quoted(name)} is no name of a layer")
    try:
        if not isinstance(value, Mapping):
            raise CheckpointError(f"it is {quoted(value)}, no object")
        entry = LayerEntry(
            format=_value(value, "format", str),
            scheme=scheme_from_json(_value(value, "scheme", dict)),
            shape=_shape_from_json(value.get("shape")),
            method=_value(value, "method", str),
            shared_with=_value(value, "shared_with", str, NoneType),
            activation=_activation_from_json(_value(value, "activation", dict, NoneType)),
            tokens_from=_value(value, "tokens_from", str, NoneType),
        )
        known, stored = codec(entry.format).version, _value(value, "codec_version", int)
        if not 1 <= stored <= known:
            raise CheckpointError(
                f"codec {entry.format} is version {quoted(stored)}, known 1 to {known}"
            )
        entry.layout()
    except QtoolError as error:
        raise CheckpointError(f"layer {shown(name)}: {str(error).rstrip('.')}") from error
    return entry


def scheme_from_json(value: Mapping[str, Any]) -> WeightScheme:
    """Return the scheme that `WeightScheme.to_json` wrote.

    Raises:
        CheckpointError: a key is missing or unknown, or its value is none that it can have.
    """
    keys = {field.name for field in fields(WeightScheme)} - {ROWS, BIT_CODE}
    if value.keys() - {ROWS, BIT_CODE} != keys:
        wrong = sorted((value.keys() - {ROWS, BIT_CODE}) ^ keys)[0]
        state = "unknown" if wrong in value else "missing"
        raise CheckpointError(f"the key {quoted(wrong)} of scheme is {state}")
    scheme = WeightScheme(
        num_bits=_value(value, "num_bits", int),
        group_size=_value(value, "group_size", int, NoneType),
        group_dim=_value(value, "group_dim", str),
        symmetric=_value(value, "symmetric", bool),
        rows=_rows_from_json(value),
        code=_code_from_json(value),
    )
    if scheme.group_size is not None and scheme.group_size > MAX_SIZE:
        raise CheckpointError(f"group_size is {quoted(scheme.group_size)}, beyond {MAX_SIZE}")
    return scheme


def _activation_from_json(value: Mapping[str, Any] | None) -> ActivationScheme | None:
    if value is None:
        return None
    keys = {field.name for field in fields(ActivationScheme)}
    if value.keys() != keys:
        wrong = sorted(value.keys() ^ keys)[0]
        state = "unknown" if wrong in value else "missing"
        raise CheckpointError(f"the key {quoted(wrong)} of activation is {state}")
    return ActivationScheme(
        num_bits=_value(value, "num_bits", int),
        granularity=_value(value, "granularity", str),
        clip_ratio=_value(value, "clip_ratio", float),
        rounding=_value(value, "rounding", float),
        scale=_value(value, "scale", float, NoneType),
    )


def _rows_from_json(value: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """Return what a scheme checks; the key is there only if rows have bits of their own."""
    rows = _value(value, ROWS, list) if ROWS in value else None
    if rows == []:
        raise CheckpointError(f"{ROWS} is []; without classes of rows, no such key is meant")
    return tuple(rows or ())


def _code_from_json(value: Mapping[str, Any]) -> BitCode | None:
    """Return what is there only if planes are stored in fewer bits than they have."""
    if BIT_CODE not in value:
        return None
    found, names = _value(value, BIT_CODE, dict), [field.name for field in fields(BitCode)]
    if found.keys() != set(names):
        wrong = sorted(found.keys() ^ set(names))[0]
        state = "unknown" if wrong in found else "missing"
        raise CheckpointError(f"the key {quoted(wrong)} of code is {state}")
    numbers = {name: _value(found, name, int) for name in names}
    if max(numbers.values()) > MAX_SIZE:
        raise CheckpointError(f"code is {quoted(found)}, beyond {MAX_SIZE}")
    return BitCode(**numbers)


def _shape_from_json(value: object) -> Shape2D:
    sizes = value if isinstance(value, list) else []
    if len(sizes) != len(Shape2D._fields) or not all(
        type(size) is int and 0 < size <= MAX_SIZE for size in sizes
    ):
        raise CheckpointError(f"shape is {quoted(value)}; two positive whole numbers are meant")
    return Shape2D(*sizes)


def _texts(config: Mapping[str, Any], key: str, what: str) -> dict[str, str]:
    found = config.get(key, {})
    if not isinstance(found, dict) or not all(type(text) is str for text in found.values()):
        raise CheckpointError(f"{key} must map {what}")
    return found


def _value(values: Mapping[str, Any], key: str, *kinds: type) -> JsonValue:
    """Return a value of exactly one of some types: JSON's true isn't 1, and 4.0 isn't 4.

    A key that may be null may be left out.
    """
    if key not in values and NoneType not in kinds:
        raise CheckpointError(f"{key} is missing")
    value = values.get(key)
    if type(value) not in kinds:
        allowed = " or ".join(JSON_NAMES[kind] for kind in kinds)
        raise CheckpointError(f"{key} is {quoted(value)}; {allowed} is meant")
    return value
