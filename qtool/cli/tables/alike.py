"""Layers that are alike as one row: a model's table fits on a screen."""

import re
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Alike = TypeVar("Alike")
LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|(?<=\[)\d+(?=\])")
"""Of a block or an expert, in the dotted name of a layer."""
MOST_STRETCHES = 4


def alike(
    rows: Iterable[Alike], name: Callable[[Alike], str], kind: Callable[[Alike], Hashable]
) -> list[tuple[str, list[Alike]]]:
    """Return rows of one kind whose names differ in numbers only, together: at the first's place.

    Each with a name for all, such as `model.layers.0-3,5.mlp.up_proj`.
    """
    found: dict[Hashable, list[Alike]] = {}
    for row in rows:
        found.setdefault((LAYER_NUMBER.sub("#", name(row)), kind(row)), []).append(row)
    return [(_shared_name(list(map(name, same))), same) for same in found.values()]


def _shared_name(names: list[str]) -> str:
    """Return one name for all, with stretches of numbers in the place of numbers."""
    numbers = zip(*(map(int, LAYER_NUMBER.findall(name)) for name in names), strict=True)
    stretches = map(_stretches, numbers)
    return LAYER_NUMBER.sub(lambda _: next(stretches), names[0])


def _stretches(numbers: Iterable[int]) -> str:
    """Return 0, 1, 2 and 5 as '0-2,5'; of many stretches the first."""
    ends: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ends and ends[-1][1] == number - 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in ends]
    return ",".join([*texts[:MOST_STRETCHES], *["..."][: len(texts) > MOST_STRETCHES]])
