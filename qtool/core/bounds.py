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
        outside = [value for value in values if not low <= value <= high]
        if outside or len(values) > MOST_VALUES:
            found = f"{len(values)} values" if not outside else str(outside[0])[:40]
            raise RecipeError(
                f"{name} {'has' if isinstance(given, tuple) else 'is'} {found}; allowed are {low:g} to {high:g}"
                + (f", at most {MOST_VALUES} values." if isinstance(given, tuple) else ".")
            )
