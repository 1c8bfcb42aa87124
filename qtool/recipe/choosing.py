"""The section `choosing` of a recipe: who gets how many bits, under a budget. Torch-free."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from qtool.recipe.schemes import check_scheme_keys
from qtool.recipe.values import MOST_LENGTH, Number, Section, WholeNumber
from qtool.storage.plain_json import JsonValue

SKIP: Literal["skip"] = "skip"
MOST_BITS = 32
MOST_CHOICES = 32
Choice = int | Mapping[str, Any] | Literal["skip"]
"""A number of bits, keys of a scheme that differ, or: leave the layer in 16 bit."""


class ChoosingSection(Section):
    """The budget, and what there is to choose from."""

    average_bits: Annotated[Number, Field(gt=0, le=MOST_BITS)]
    """Stored bits per weight that the layers may have on average, scales and offsets counted."""
    counts: Literal["blocks", "strict"] = "blocks"
    """Whose bits: of the linears of the blocks; or of the whole model, that is all bytes, those of
    embedding, head and norms too, by all values."""
    choices: tuple[Choice, ...] = (2, 3, 4)
    """For each layer of the blocks: bits, keys of `weights.scheme` that differ, or `skip`."""
    tables: tuple[Choice, ...] = (3, 4, 6, 8)
    """Likewise for an embedding or head that the recipe quantizes, over the scheme of its section,
    where `counts` is `strict`; empty: it has the bits that the recipe says."""
    tokens: Annotated[WholeNumber, Field(ge=16, le=MOST_LENGTH)] = 16384
    """Of the calibration samples, that prices are measured on."""

    @field_validator("choices", "tables", mode="before")
    @classmethod
    def _check_choices(cls, value: JsonValue) -> JsonValue:
        """Refuse what is no scheme; a union of types would say it in riddles."""
        if not isinstance(value, list | tuple):
            raise ValueError("it should be a list, such as [2, 3, 4]")
        if len(value) > MOST_CHOICES:
            raise ValueError(f"it should have at most {MOST_CHOICES} choices")
        for one in value:
            if one != SKIP and not isinstance(one, Mapping) and type(one) is not int:
                raise ValueError(
                    f"a choice is {one!r}; it should be a number of bits, keys of a scheme such as "
                    "{num_bits: 3, group_size: 64}, or skip"
                )
            if (changes := scheme_changes(one)) is not None:
                check_scheme_keys(changes)
        if any(one in value[:place] for place, one in enumerate(value)):
            raise ValueError("a choice is given twice")
        return value

    @field_validator("choices")
    @classmethod
    def _check_some(cls, value: tuple[Choice, ...]) -> tuple[Choice, ...]:
        if not value:
            raise ValueError("name at least one choice")
        return value


def scheme_changes(choice: Choice) -> Mapping[str, Any] | None:
    """Return the keys of the scheme that a choice changes; None: the layer is skipped."""
    if isinstance(choice, int):
        return {"num_bits": choice}
    return choice if isinstance(choice, Mapping) else None
