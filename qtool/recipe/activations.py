"""The section `activations` of a recipe: how the inputs of linears are quantized. Torch-free."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qtool.recipe.values import Number, Section, WholeNumber
from qtool.scheme import MAX_BITS, ActivationScheme, Granularity

RangeRule = Literal["max", "percentile", "mse"]


class ActivationsSection(Section):
    """How the inputs of all quantized linears of the decoder blocks are quantized as they run."""

    num_bits: Annotated[WholeNumber, Field(ge=2, le=MAX_BITS)] = 8
    """Of a code; codes are symmetric, from -(2^(k-1) - 1) to 2^(k-1) - 1."""
    granularity: Granularity = "token"
    """`token`: a step per token, found as it comes (dynamic); `tensor`: one step for all, found on
    the calibration samples (static)."""
    clip_ratio: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """With granularity `token`: share of a token's largest absolute value that codes cover."""
    range: RangeRule = "max"
    """With granularity `tensor`: codes cover the largest absolute value seen, a percentile of
    them, or what gives the least squared error."""
    percentile: Annotated[Number, Field(gt=50, le=100)] = 99.99
    """Of absolute values, with range `percentile`."""

    def scheme(self, scale: float | None) -> ActivationScheme:
        """Return the scheme of one linear; `scale` is the step per tensor, None per token."""
        return ActivationScheme(
            num_bits=self.num_bits,
            granularity=self.granularity,
            clip_ratio=self.clip_ratio,
            scale=scale,
        )

    @model_validator(mode="after")
    def _check_granularity(self) -> "ActivationsSection":
        """Refuse what the granularity would pass over."""
        if self.granularity == "tensor" and self.clip_ratio != 1:
            raise ValueError(
                f"clip_ratio, {self.clip_ratio:g}, is for granularity token; per tensor, range "
                "says what codes cover: leave clip_ratio out"
            )
        if self.granularity == "token" and self.range != "max":
            raise ValueError(
                f"range, {self.range}, is for granularity tensor; per token, clip_ratio says what "
                "codes cover: leave range out"
            )
        if self.range != "percentile":
            self.refuse_unread("percentile", needs="granularity tensor and range percentile")
        return self
