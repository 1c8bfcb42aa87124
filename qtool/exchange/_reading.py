"""Tensors of a directory that another program wrote: checked by name, shape and dtype."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from qtool.checkpoint.manifest import JSON_NAMES
from qtool.checkpoint.shards import Shards, open_shards, read_json
from qtool.errors import CheckpointError
from qtool.formats._dtypes import DTYPES
from qtool.wording import quoted, shown

CONFIG_FILE = "config.json"
SECTION = "quantization_config"


@dataclass(frozen=True, slots=True)
class ForeignDirectory:
    """Configuration and headers."""

    path: Path
    config: Mapping[str, Any]
    """Without `quantization_config`."""
    section: Mapping[str, Any]
    """`quantization_config`."""
    shards: Shards

    def value(self, key: str, *kinds: type, default: Any = None) -> Any:  # noqa: ANN401
        """Return a value of the section.

        Raises:
            CheckpointError: it has another type; without a default, it is missing.
        """
        return value_of(self.section, key, *kinds, default=default, where=self.where)

    @property
    def where(self) -> str:
        """How messages call the section."""
        return f"{self.path / CONFIG_FILE}: {SECTION}"

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a stored tensor.

        Raises:
            CheckpointError: there is none of that name.
        """
        spec = self.shards.specs.get(name)
        if spec is None:
            raise CheckpointError(f"{self.path}: tensor {shown(name)} is missing. Copy it again.")
        return spec.shape

    def matrix(self, name: str) -> tuple[int, int]:
        """Return the shape of a stored matrix.

        Raises:
            CheckpointError: there is none of that name.
        """
        found = self.shape(name)
        if len(found) != 2 or not min(found):  # noqa: PLR2004
            raise CheckpointError(f"{self.path}: {shown(name)} has shape {found}, no matrix.")
        return found[0], found[1]

    def read(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
        """Return a tensor, if it is what it must be.

        Raises:
            CheckpointError: it is missing, unreadable, or of another shape or dtype.
        """
        found = self.shape(name)
        spec = self.shards.specs[name]
        if found != shape or DTYPES.get(spec.dtype) not in dtypes:
            meant = " or ".join(str(dtype)[6:] for dtype in dtypes)
            raise CheckpointError(
                f"{spec.file}: {shown(name)} is {spec.dtype} {found}; {meant} {shape} is meant. "
                "Configuration and weights don't belong together, or a file is damaged."
            )
        return self.shards.read(name)


def value_of(
    values: Mapping[str, Any],
    key: str,
    *kinds: type,
    where: str,
    default: Any = None,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Return a value of one of some types; null and what is left out are the default.

    Raises:
        CheckpointError: it has another type, or is missing and NoneType isn't among the types.
    """
    value = values.get(key)
    if value is None:
        value = default
    if value is None and NoneType not in kinds and default is None:
        raise CheckpointError(f"{where} has no {key}.")
    if value is not None and type(value) not in kinds:
        allowed = " or ".join(JSON_NAMES[kind] for kind in kinds)
        raise CheckpointError(f"{where}: {key} is {quoted(value)}; {allowed} is meant.")
    return value


def open_foreign(path: Path) -> ForeignDirectory:
    """Open a directory whose config.json has a `quantization_config`.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    config = read_json(path / CONFIG_FILE)
    section = config.pop(SECTION, None)
    if not isinstance(section, dict):
        raise CheckpointError(
            f"{path / CONFIG_FILE}: {SECTION} is {quoted(section)}; an object is meant."
        )
    config.pop("auto_map", None)
    return ForeignDirectory(path, config, section, open_shards(path))


def check_int(value: int, allowed: tuple[int, ...], key: str, where: str) -> int:
    """Return a number that is one of some.

    Raises:
        CheckpointError: it is another.
    """
    if value not in allowed:
        meant = ", ".join(map(str, allowed))
        raise CheckpointError(f"{where}: {key} is {quoted(value)}; {meant} are known.")
    return value


def layers_named(directory: ForeignDirectory, part: str, *, optional: bool = False) -> list[str]:
    """Return the names of layers that have a part.

    Raises:
        CheckpointError: none has, and that isn't optional.
    """
    end = f".{part}"
    names = [name.removesuffix(end) for name in directory.shards.specs if name.endswith(end)]
    if not names and not optional:
        raise CheckpointError(
            f"{directory.path}: no tensor is called {end}: nothing is quantized there."
        )
    return names


def others(
    directory: ForeignDirectory, layers: Iterable[str], parts: Iterable[str]
) -> dict[str, Callable[[], Tensor]]:
    """Return what reads each tensor that is no part of a layer."""
    owned = {f"{name}.{part}" for name in layers for part in parts}
    return {
        name: partial(directory.shards.read, name)
        for name in directory.shards.specs
        if name not in owned
    }


def order_of_groups(g_idx: Tensor, group: int, where: str) -> Tensor | None:
    """Return inputs sorted by group, (in_features,) int64; None where they are as they come.

    Args:
        g_idx: (in_features,) int64, the group of each.
        group: Inputs of each group; the last may have fewer.
        where: The tensor, for messages.

    Raises:
        CheckpointError: there is no such group, or one has another number of inputs.
    """
    usual = torch.arange(len(g_idx)) // group
    if torch.equal(g_idx, usual):
        return None
    low, high, last = int(g_idx.min()), int(g_idx.max()), int(usual[-1])
    if low < 0 or high > last:
        raise CheckpointError(
            f"{where} holds groups {low} to {high}; 0 to {last} are meant. Copy the model again."
        )
    order = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[order], usual):
        raise CheckpointError(
            f"{where} gives groups other than {group} inputs each, which no format of qtool holds."
        )
    return order
