"""The section `scheme` of a recipe, and what is laid over it. Torch-free."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError

from qtool.plugins import describe_miss
from qtool.recipe.values import MOST_LENGTH, Section, WholeNumber
from qtool.scheme import MAX_BITS, GroupDim, WeightScheme


class SchemeSection(Section):
    """Bits and grouping of a weight."""

    num_bits: Annotated[WholeNumber, Field(ge=1, le=MAX_BITS)] = 4
    """Bits per code, or number of bit planes."""
    group_size: Annotated[WholeNumber, Field(ge=1, le=MOST_LENGTH)] | None = 128
    """Neighbours that share scales; null: one group spans the whole dimension."""
    group_dim: GroupDim = "in_features"
    """Dimension along which a group runs."""
    symmetric: bool = False
    """No zero point (affine) or no offset (binary coding)."""

    def to_scheme(self) -> WeightScheme:
        """Return the scheme as the rest of qtool knows it."""
        return WeightScheme(**self.model_dump())


def check_scheme_keys(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return keys of a scheme that differ, if `SchemeSection` takes them: here the line is known.

    Raises:
        ValueError: a key is unknown, or a value impossible.
    """
    known = tuple(SchemeSection.model_fields)
    for key in value:
        if key not in known:
            raise ValueError(describe_miss(str(key), known, "scheme").removesuffix("."))
    try:
        SchemeSection(**value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{first['loc'][0]}: {first['msg']}") from None
    return value
