"""The section `fold` of a recipe: factors between inputs and weights. Torch-free."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from qtool.recipe.values import MOST_LENGTH, MOST_TOKENS, Name, Section, Text, WholeNumber


class FoldSection(Section):
    """Who chooses the factors, and on what."""

    name: Name
    """A fold; `qtool methods` lists them."""
    options: Mapping[str, Any] = {}
    """Its options."""
    groups: Annotated[tuple[Text, ...], Field(max_length=100)] = ()
    """Linears whose inputs are folded, by their names in a block, such as `self_attn.q_proj`;
    empty: all that can be."""
    tokens: Annotated[WholeNumber, Field(ge=16, le=MOST_LENGTH)] = 512
    """Of the calibration samples, that errors are measured on."""
    tokens_seen: Annotated[WholeNumber, Field(ge=16, le=MOST_TOKENS)] = 16384
    """That means and largest values are of; rounded to whole samples."""
