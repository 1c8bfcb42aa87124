"""`quantization_config` of compressed-tensors: which layers have which numbers.

Source: compressed-tensors 0.20, `quantization/quant_args.py`, `quant_scheme.py`, `quant_config.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtool.errors import CheckpointError
from qtool.exchange._reading import ForeignDirectory, value_of
from qtool.scheme import ActivationScheme
from qtool.wording import quoted, shown

IN_WORDS = "pack-quantized"
IN_BYTES = ("int-quantized", "naive-quantized")
"""Codes of a byte each."""
SEVERAL_FORMATS = "mixed-precision"
PATTERN = "re:"
BY_GROUP, BY_ROW, BY_TENSOR = "group", "channel", "tensor"


@dataclass(frozen=True, slots=True, kw_only=True)
class CtGroup:
    """One of `config_groups`: what layers have whose name or class is a target."""

    key: str
    targets: tuple[str, ...]
    num_bits: int
    symmetric: bool
    strategy: str
    group_size: int | None
    packed: bool
    activation: ActivationScheme | None


def read_groups(directory: ForeignDirectory) -> tuple[CtGroup, ...]:
    """Return the groups of a configuration.

    Raises:
        CheckpointError: one is damaged, or is of a kind that isn't read.
    """
    kind = directory.value("format", str, default=IN_WORDS)
    if directory.section.get("kv_cache_scheme") not in (None, {}):
        raise CheckpointError(
            f"{directory.where}: kv_cache_scheme quantizes keys and values, which isn't imported."
        )
    transforms = directory.section.get("transform_config")
    if isinstance(transforms, dict):
        transforms = transforms.get("config_groups")
    if transforms not in (None, {}):
        raise CheckpointError(
            f"{directory.where}: transform_config rotates activations while the model runs, which "
            "isn't imported."
        )
    status = directory.value("quantization_status", str, default="compressed")
    if status not in ("compressed", "frozen"):
        raise CheckpointError(
            f"{directory.where}: quantization_status is {shown(status)}; compressed is meant."
        )
    groups = directory.value("config_groups", dict)
    found = tuple(_group(key, value, kind, directory.where) for key, value in groups.items())
    if not found:
        raise CheckpointError(f"{directory.where}: config_groups is empty.")
    return found


def _group(key: str, value: object, kind: str, where: str) -> CtGroup:
    where = f"{where}: config_groups.{shown(key)}"
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is {quoted(value)}; an object is meant.")
    targets = value_of(value, "targets", list, where=where)
    weights = value_of(value, "weights", dict, where=where)
    own = value_of(value, "format", str, default=kind, where=where)
    if own not in (IN_WORDS, *IN_BYTES):
        known = ", ".join((IN_WORDS, *IN_BYTES))
        raise CheckpointError(f"{where}: format is {shown(own)}; {known} are read.")
    within = f"{where}.weights"
    number = value_of(weights, "type", str, default="int", where=within)
    bits = value_of(weights, "num_bits", int, default=8, where=within)
    if number != "int" or not 1 <= bits <= 8:  # noqa: PLR2004
        raise CheckpointError(
            f"{within} are {shown(number)} of {bits} bits; int of 1 to 8 bits is read."
        )
    size = value_of(weights, "group_size", int, default=-1, where=within)
    strategy = value_of(
        weights, "strategy", str, default=BY_GROUP if size > 0 else BY_TENSOR, where=within
    )
    if strategy not in (BY_GROUP, BY_ROW, BY_TENSOR) or (strategy == BY_GROUP and size < 1):
        raise CheckpointError(
            f"{within}: strategy is {shown(strategy)} with group_size {size}; group with a size, "
            "channel and tensor are read."
        )
    return CtGroup(
        key=key,
        targets=tuple(map(str, targets)),
        num_bits=bits,
        symmetric=value_of(weights, "symmetric", bool, default=True, where=within),
        strategy=strategy,
        group_size=size if strategy == BY_GROUP else None,
        packed=own == IN_WORDS,
        activation=_activation(value.get("input_activations"), where),
    )


def _activation(value: object, where: str) -> ActivationScheme | None:
    """Return how inputs are quantized: not, or by a step of their own per token in 8 bits."""
    if value is None:
        return None
    usual = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    if not isinstance(value, dict) or any(value.get(key) != one for key, one in usual.items()):
        raise CheckpointError(
            f"{where}: input_activations are {quoted(value)}; none, or symmetric int of 8 bits, "
            "dynamic, by token, are read."
        )
    return ActivationScheme()


def group_of(groups: tuple[CtGroup, ...], name: str, where: str) -> CtGroup:
    """Return the group of a layer: by its name, by a pattern, or the one for all linears.

    Raises:
        CheckpointError: none has it, or a pattern is none.
    """
    if len(groups) == 1:
        return groups[0]
    for matches in (_is_named, _is_matched, _is_of_class):
        for group in groups:
            if any(matches(target, name, where) for target in group.targets):
                return group
    raise CheckpointError(f"{where}: no target of config_groups is {shown(name)}, which is stored.")


def _is_named(target: str, name: str, _where: str) -> bool:
    return target == name


def _is_matched(target: str, name: str, where: str) -> bool:
    if not target.startswith(PATTERN):
        return False
    try:
        return re.match(target.removeprefix(PATTERN), name) is not None
    except (re.error, RecursionError) as error:
        raise CheckpointError(
            f"{where}: {quoted(target)} is no regular expression ({error})."
        ) from error


def _is_of_class(target: str, _name: str, _where: str) -> bool:
    return target == "Linear"


def weights_config(num_bits: int, group_size: int | None, *, symmetric: bool) -> dict[str, Any]:
    """Return `weights` of a group."""
    return {
        "num_bits": num_bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": BY_ROW if group_size is None else BY_GROUP,
        "group_size": group_size,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def inputs_config() -> Mapping[str, Any]:
    """Return `input_activations` of a group whose inputs are quantized."""
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "block_structure": None,
        "dynamic": True,
        "actorder": None,
        "observer": None,
        "observer_kwargs": {},
    }
