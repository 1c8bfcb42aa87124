"""The section `search` of a recipe: what a few numbers per layer are worth. Torch-free."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from qtool.recipe.values import MOST_LENGTH, Number, Section, WholeNumber
from qtool.scheme import MAX_SHIFT

MOST_TRIED = 100
Ratio = Annotated[Number, Field(ge=1e-3, le=1)]
Shift = Annotated[Number, Field(ge=-MAX_SHIFT, le=MAX_SHIFT)]
Ratios = Annotated[tuple[Ratio, ...], Field(max_length=MOST_TRIED)]
Shifts = Annotated[tuple[Shift, ...], Field(max_length=MOST_TRIED)]
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
SHIFTS = (-0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15)
CLIPS_OF_INPUTS = (1.0, 0.95, 0.9, 0.85, 0.8)
SHIFTS_OF_INPUTS = (-0.1, -0.05, 0.0, 0.05, 0.1)


class SearchSection(Section):
    """What is tried for each layer, and how it is judged: by the loss of the whole model.

    A list says what is tried beside what the recipe itself says; an empty one leaves it at that.
    """

    method: Literal["grid", "tpe"] = "grid"
    """grid: one number after the other, for linears that share an input; tpe: those of a block
    together, as Optuna proposes them."""
    clip_ratios: Ratios = CLIPS
    """Of weights, for methods with the option `clip_ratio`."""
    roundings: Shifts = SHIFTS
    """Of weights, for methods with the option `rounding`."""
    activation_clip_ratios: Ratios = CLIPS_OF_INPUTS
    """Of the inputs, where the recipe quantizes them."""
    activation_roundings: Shifts = SHIFTS_OF_INPUTS
    """Likewise."""
    keep: Annotated[WholeNumber, Field(ge=1, le=MOST_TRIED)] = 3
    """With `grid`: of the values of a number, those with the least error of the block's output are
    judged by the loss."""
    trials: Annotated[WholeNumber, Field(ge=1, le=10_000)] = 40
    """With `tpe`: for each block."""
    samples: Annotated[WholeNumber, Field(ge=2, le=MOST_LENGTH)] = 8
    """That losses are measured on, and as many others that decide whether a choice is taken."""
    sequence_length: Annotated[WholeNumber, Field(ge=2, le=MOST_LENGTH)] = 512
    """Tokens of each."""

    @field_validator("clip_ratios", "roundings", "activation_clip_ratios", "activation_roundings")
    @classmethod
    def _check_once(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a value is given twice")
        return value

    @model_validator(mode="after")
    def _check_method(self) -> "SearchSection":
        """Refuse what the method would pass over."""
        name, method = ("trials", "tpe") if self.method == "grid" else ("keep", "grid")
        self.refuse_unread(name, needs=f"method {method}")
        return self
