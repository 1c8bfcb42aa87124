"""What a checkpoint holds unquantized, and why: one line for weights that are alike."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

OUTSIDE_BLOCKS = "outside of the decoder blocks"
"""How the reason of a weight begins that is neither in a block nor embedding or head."""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class KeptKind:
    """Weights that aren't quantized for one reason, and whose names differ in numbers only."""

    kind: str
    """Their name, with `*` in place of the numbers that differ."""
    why: str
    names: tuple[str, ...]
    """Of their tensors."""


def kept_kinds(reasons: Mapping[str, str]) -> tuple[KeptKind, ...]:
    """Return the kinds of what a manifest lists as `unquantized`, in its order.

    Args:
        reasons: Names of tensors with the reason why each isn't quantized.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for name, why in reasons.items():
        found.setdefault((_NUMBER.sub("*", name), why), []).append(name)
    return tuple(
        KeptKind(_common(names).removesuffix(".weight"), why, tuple(names))
        for (_, why), names in found.items()
    )


def _common(names: Iterable[str]) -> str:
    """Return names that differ in numbers as one; a number that all have stays."""
    parts = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(each[0] if len(set(each)) == 1 else "*" for each in parts)
