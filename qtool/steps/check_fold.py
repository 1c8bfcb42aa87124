"""What can be wrong with a recipe's section `fold`."""

from qtool import plugins
from qtool.base import ModelAdapter
from qtool.errors import RecipeError
from qtool.folds import load_fold
from qtool.modeling.foldable import check_foldable
from qtool.modeling.source import ModelSource
from qtool.plugins import PluginOptions
from qtool.recipe.folding import FoldSection
from qtool.recipe.schema import Recipe
from qtool.steps.options import read_options


def fold_options(section: FoldSection) -> PluginOptions:
    """Return the options of the fold.

    Raises:
        RecipeError: unknown key, wrong type or impossible value.
        UnknownNameError: there is no such fold.
    """
    options = load_fold(section.name).options
    return read_options(section.name, options, section.options, "fold.options")


def check_fold(recipe: Recipe, adapter: ModelAdapter) -> None:
    """Check what the names of the linears decide.

    Raises:
        RecipeError: an option is wrong, or there is no data.
        UnknownNameError: there is no such fold, or no such linear.
    """
    section = recipe.fold
    if section is None:
        return
    fold_options(section)
    if recipe.calibration is None:
        raise RecipeError(
            "fold needs calibration data to see what inputs linears have. Give the recipe a "
            "section 'calibration', or leave out --no-calibration."
        )
    known = tuple(name for names in adapter.linears for name in names)
    for name in section.groups:
        plugins.check_name(name, known, "fold.groups")


def check_folded(source: ModelSource, recipe: Recipe) -> None:
    """Check what can be folded in a model.

    Raises:
        ModelError: what the recipe names can't be, or nothing can.
    """
    if recipe.fold is not None:
        check_foldable(source, recipe.fold.groups)
