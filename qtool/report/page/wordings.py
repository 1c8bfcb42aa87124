"""Numbers and names of layers as people read them on the page."""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from math import isfinite

from qtool.report.verdict import number_text
from qtool.wording import ROUNDS_UP

IN_A_LIST = re.compile(r"\.(\d+)(?=\.)")
"""In the name of a layer: its number in a list of modules."""
NOT_A_NUMBER = "not a number"
Z_95 = 1.96
"""Standard errors to either side of a mean that hold it in 95 of 100 measurements."""


def text_of(value: object, sign: str = "") -> str:
    """Return a number in five digits; what is none, or none that is finite, in words."""
    if value is None:
        return "not measured"
    if not isinstance(value, int | float) or not isfinite(value):
        return NOT_A_NUMBER
    return number_text(value, sign)


def interval(value: float | None, error: float | None, scale: float = 1.0) -> str:
    """Return a mean with half the width of its 95 % interval, in digits that this allows."""
    if value is None:
        return NOT_A_NUMBER
    if error is None:
        return f"{scale * value:.4g}"
    half = Z_95 * error * scale
    exponent = int(f"{half:.1e}".partition("e")[2])
    digits = min(max(1 - exponent, 0), 6)  # two that count
    return f"{scale * value:.{digits}f} ± {half:.{digits}f}"


def scientific(value: float | None) -> str:
    """Return an error, which may be tiny."""
    return NOT_A_NUMBER if value is None else f"{value:.2e}"


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    if 1000 * seconds < ROUNDS_UP:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 59.95:  # noqa: PLR2004 - more is 60.0
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def place_of(name: str) -> tuple[int | None, str]:
    """Return the block of a layer, None outside of blocks, and what it is there.

    Experts of a layer are of one kind: `mlp.experts.*.up_proj`.
    """
    found = IN_A_LIST.search(name)
    if found is None:
        return None, name
    rest = name[found.end() + 1 :]
    return int(found[1]), IN_A_LIST.sub(".*", rest)


def ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers in short: 0-3, 7."""
    return ", ".join(_runs(numbers))


def _runs(numbers: Iterable[int]) -> Iterator[str]:
    for _, pairs in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in pairs]
        yield str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"
