"""How the inputs of a linear are quantized: as planned, or by the range of what it sees."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from qtool.core.activations import SMALLEST_STEP
from qtool.core.magnitudes import Magnitudes
from qtool.errors import RecipeError
from qtool.recipe.activations import ActivationsSection
from qtool.recipe.schema import Recipe
from qtool.scheme import ActivationScheme, InputScheme, StaticInputs


def has_static_inputs(recipe: Recipe) -> bool:
    """Return whether inputs of linears have steps that are found on samples."""
    return recipe.activations is not None and recipe.activations.granularity == "tensor"


def check_inputs(recipe: Recipe) -> None:
    """Refuse steps that are found on samples where there are none."""
    if recipe.calibration is None and has_static_inputs(recipe):
        raise RecipeError(
            "activations.granularity is 'tensor', and such scales are found on calibration data. "
            "Give the recipe a section 'calibration', leave out --no-calibration, or use 'token'."
        )


def known_scheme(recipe: Recipe) -> InputScheme:
    """Return how inputs are quantized, as far as no sample is needed to tell."""
    section = recipe.activations
    if section is None:
        return None
    return StaticInputs() if has_static_inputs(recipe) else section.scheme(None)


def input_scheme(
    section: ActivationsSection | None,
    planned: Mapping[str, InputScheme],
    layer: str,
    inputs: Iterable[Tensor],
) -> ActivationScheme | None:
    """Return how the inputs of a linear, and of others that share them, are quantized.

    Args:
        section: Of the recipe.
        planned: What is known without data, by layer.
        layer: Dotted name of the linear.
        inputs: What it sees, each (tokens, in_features), finite; looked at if it has to be.

    Returns:
        None: they aren't.
    """
    known = planned[layer]
    if not isinstance(known, StaticInputs):
        return known
    assert section is not None
    seen: Magnitudes | None = None
    for batch in inputs:
        seen = seen or Magnitudes.none(batch.device)
        seen.add(batch)
    assert seen is not None
    return static_scheme(section, known, seen)


def static_scheme(
    section: ActivationsSection, known: StaticInputs, seen: Magnitudes
) -> ActivationScheme:
    """Return how inputs are quantized, now that they have been seen."""
    step = max(known.clip_ratio * step_of(section, seen), SMALLEST_STEP)
    return replace(section.scheme(step), rounding=known.rounding)


def step_of(section: ActivationsSection, seen: Magnitudes) -> float:
    """Return the step by which the recipe covers what was seen."""
    largest_code = 2 ** (section.num_bits - 1) - 1
    ranges: Mapping[str, Callable[[], float]] = {
        "max": seen.largest,
        "percentile": lambda: seen.percentile(section.percentile),
        "mse": lambda: seen.best_range(largest_code),
    }
    return max(ranges[section.range]() / largest_code, SMALLEST_STEP)
