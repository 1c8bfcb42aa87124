"""Bounds of the options of methods: a slip of the keyboard is found before hours are spent."""

from typing import Any

from qtool.errors import RecipeError

MOST_VALUES = 100
"""Of an option that takes several."""


def check_bounds(options: Any, **bounds: tuple[float, float]) -> None:  # noqa: ANN401
    """Refuse options outside of their bounds; of a tuple each value counts, NaN is never inside.

    Args:
        options: Has an attribute for each of `bounds`.
        **bounds: The smallest and the largest value by name.

    Raises:
        RecipeError: the first option that is outside.
    """
    for name, (low, high) in bounds.items():
        given = getattr(options, name)
        values = given if isinstance(given, tuple) else (given,)
        outside = next((value for value in values if not low <= value <= high), None)
        if outside is not None:
            raise RecipeError(f"{name} is {str(outside)[:40]}; allowed are {low:g} to {high:g}.")
        if len(values) > MOST_VALUES:
            raise RecipeError(f"{name} has {len(values)} values; allowed are {MOST_VALUES}.")
