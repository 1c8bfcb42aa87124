"""The section `training` of a recipe: how `qtool train` goes on from there. Torch-free."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from qtool.recipe.values import Name, Number, Section


class TrainingSection(Section):
    """A training recipe and its options; other commands than `train` leave it aside."""

    name: Name
    """A training recipe: `distillation`, `teacher-intervention`."""
    options: Mapping[str, Any] = {}
    """Options of the training recipe; `--set` of `qtool train` changes them."""
    learning_rate: Annotated[Number, Field(gt=0, le=1)] | None = None
    """At its highest; null: the training recipe's."""
