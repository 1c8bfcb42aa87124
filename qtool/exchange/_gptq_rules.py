"""`dynamic` of a GPTQ configuration: which modules have bits and groups of their own.

Keys are regular expressions that match from the beginning of a module's name, after `+:` or
nothing; after `-:`, modules that aren't quantized. The first that matches counts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtool.errors import CheckpointError
from qtool.exchange._reading import value_of
from qtool.wording import quoted, shown

HAS_CODES, LEFT_PLAIN = "+:", "-:"


@dataclass(frozen=True, slots=True)
class Rule:
    """How a module is stored."""

    num_bits: int
    group_size: int
    """Inputs of a group; -1: all."""
    version: int
    """1: zero points are stored less one; 2: as they are."""


def rule_of(dynamic: Mapping[str, Any], name: str, default: Rule, where: str) -> Rule:
    """Return what holds for a module.

    Raises:
        CheckpointError: a rule is damaged.
    """
    for pattern, values in dynamic.items():
        if _matches(pattern, name, where):
            if not isinstance(values, dict):
                raise CheckpointError(
                    f"{where}: dynamic.{shown(pattern)} is {quoted(values)}; an object is meant."
                )
            key = f"{where}: dynamic.{shown(pattern)}"
            bits = value_of(values, "bits", int, default=default.num_bits, where=key)
            size = value_of(values, "group_size", int, default=default.group_size, where=key)
            return Rule(num_bits=bits, group_size=size, version=default.version)
    return default


def _matches(pattern: str, name: str, where: str) -> bool:
    if pattern.startswith(LEFT_PLAIN):
        return False
    try:
        return re.match(pattern.removeprefix(HAS_CODES), name) is not None
    except (re.error, RecursionError) as error:
        raise CheckpointError(
            f"{where}: dynamic has {quoted(pattern)}, no regular expression ({error})."
        ) from error


def exactly(name: str) -> str:
    """Return the key of a rule about one module."""
    return f"{HAS_CODES}^{re.escape(name)}$"
