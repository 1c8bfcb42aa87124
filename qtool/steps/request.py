"""What a recipe asks for, checked by the names of layers alone, before a model is built."""

from collections.abc import Iterator, Sequence
from typing import Literal

from qtool.base import ModelAdapter
from qtool.errors import RecipeError
from qtool.recipe.calibration import CalibrationSection
from qtool.recipe.matching import matches
from qtool.recipe.schema import Recipe, TableSection, WeightsSection, is_named, resolve
from qtool.steps.activation_ranges import check_inputs, has_static_inputs
from qtool.steps.check_fold import check_fold, fold_options
from qtool.steps.method_choice import check_bits, check_tunable, load_method, methods_of
from qtool.steps.table_rows import check_rows

Role = Literal["block", "embedding", "head"]


def with_samples(recipe: Recipe) -> Recipe:
    """Return the recipe with default samples, if its method does better with data or it tunes."""
    overridden = (override.method for override in recipe.weights.overrides)
    names = {recipe.weights.method, *recipe.weights.choose.method}
    names |= {name for name in overridden if name is not None}
    methods = [load_method(name) for name in sorted(names)]
    counts = any(table is not None and table.rows for table in (recipe.embedding, recipe.head))
    sections = (recipe.choosing, recipe.fold, recipe.search)
    learns = recipe.tuning.is_on or any(section is not None for section in sections)
    sees = counts or learns or has_static_inputs(recipe)
    wanted = sees or any(method.needs | method.uses for method in methods)
    if recipe.calibration is not None or not wanted:
        return recipe
    return recipe.model_copy(update={"calibration": CalibrationSection()})


def check_request(
    recipe: Recipe, adapter: ModelAdapter, linears: Sequence[str], others: Sequence[str]
) -> None:
    """Check what the names of the layers decide: found before the model is built.

    Linears and others are the dotted names of all linears of the decoder blocks, and of what else
    these are made of, which an override may skip.

    Raises:
        RecipeError: an option is wrong, an override matches nothing, or a method lacks its data.
        SchemeError: a method doesn't have the bits.
        UnknownNameError: there is no such method.
    """
    _check_overrides(recipe, linears, others)
    _check_data(recipe)
    check_fold(recipe, adapter)
    depth, sensitive = adapter.blocks.count(".") + 2, frozenset(adapter.sensitive)
    blocks = (
        (name, "block", section_of(recipe, name, is_sensitive=inner in sensitive))
        for name in linears
        if (inner := ".".join(name.split(".")[depth:]))
    )
    tables = (
        (adapter.embedding, "embedding", recipe.embedding),
        (adapter.head, "head", recipe.head),
    )
    for name, role, layer in (*blocks, *tables):
        if layer is not None:
            _check_section(name, role, layer, recipe)


def check_recipe_alone(recipe: Recipe) -> None:
    """Check what needs no model to be known: names of plug-ins, bits of all layers, data.

    Raises:
        RecipeError, SchemeError, UnknownNameError: as `check_request`.
    """
    _check_data(recipe)
    if recipe.fold is not None:
        fold_options(recipe.fold)
    if not recipe.weights.overrides:  # else it may be the method of no layer
        _check_section("weights", "block", recipe.weights, recipe)
    for role, table in (("embedding", recipe.embedding), ("head", recipe.head)):
        if table is not None:
            _check_section(role, role, table, recipe)


def _check_data(recipe: Recipe) -> None:
    """Refuse what needs data where there are none."""
    choose = recipe.weights.choose
    if recipe.calibration is None and (choose.group_dim or choose.method):
        raise RecipeError("weights.choose needs calibration data to choose by.")
    for section, is_there, purpose in (
        ("tuning", recipe.tuning.is_on, "to learn from"),
        ("choosing", recipe.choosing is not None, "to tell what bits are worth"),
        ("search", recipe.search is not None, "to measure losses on"),
    ):
        if is_there and recipe.calibration is None:
            raise RecipeError(
                f"{section} needs calibration data {purpose}. Give the recipe a section "
                "'calibration', or leave out --no-calibration."
            )
    check_inputs(recipe)


def section_of(recipe: Recipe, layer: str, *, is_sensitive: bool) -> WeightsSection | None:
    """Return how a linear of the blocks is quantized; None: it stays in 16 bit.

    A sensitive one stays so unless an override that isn't `skip` matches its name.
    """
    if is_sensitive and not is_named(recipe.weights, layer):
        return None
    return resolve(recipe.weights, layer)


def _check_section(
    name: str, role: str, section: WeightsSection | TableSection, recipe: Recipe
) -> None:
    method, calibrated = load_method(section.method), recipe.calibration is not None
    choice, num_bits = methods_of(section), section.scheme.num_bits
    check_bits(name, choice, num_bits, f"num_bits is {num_bits}")
    if role == "block" and recipe.tuning.is_on:
        check_tunable(name, choice)
    if isinstance(section, TableSection) and section.rows is not None:
        check_rows(name, section, method, choice[0][1], calibrated=calibrated)
    if method.needs and role != "block":
        raise RecipeError(
            f"{name}: '{section.method}' needs calibration data, and an {role} is "
            "quantized without. Use 'rtn' or 'bcq' for it.",
            layer=name,
        )
    if method.needs and not calibrated:
        raise RecipeError(
            f"{name}: '{section.method}' needs calibration data. Give the recipe a section "
            "'calibration' (an empty one draws from the bundled text), or pass "
            "--calibration DIR.",
            layer=name,
        )


def _check_overrides(recipe: Recipe, names: Sequence[str], others: Sequence[str]) -> None:
    for number, override in enumerate(recipe.weights.overrides):
        known = (*names, *others) if override.skip else names
        if not any(matches(name, override.match) for name in known):
            raise RecipeError(
                f"weights.overrides.{number}.match is {override.match!r}, which matches none of "
                f"the {len(names)} layers; the first is {names[0]}."
            )


def shadowed_overrides(recipe: Recipe, names: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for each override that decides nothing: earlier ones match its layers.

    Names are the dotted ones of all linears of the decoder blocks.
    """
    free = list(names)
    for number, override in enumerate(recipe.weights.overrides):
        meant = [name for name in free if matches(name, override.match)]
        if not meant and any(matches(name, override.match) for name in names):
            yield (
                f"weights.overrides.{number} ({override.match}) does nothing: the first match "
                "wins, and earlier overrides match all its layers. Put it before them."
            )
        free = [name for name in free if name not in set(meant)]
