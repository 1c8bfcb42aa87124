"""The section `rows` of a recipe's embedding or head: bits per row by frequency. Torch-free."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qtool.recipe.values import Number, Section, WholeNumber
from qtool.scheme import MAX_BITS

Width = Annotated[WholeNumber, Field(ge=1, le=MAX_BITS)]


class RowsSection(Section):
    """How the rows of a table, which are tokens, share its bits."""

    rule: Literal["loss", "clusters"] = "loss"
    """loss: least expected divergence under the average; clusters: sizes by a ratio, as in the
    paper."""
    average_bits: Annotated[Number, Field(ge=1, le=MAX_BITS)] | None = None
    """Bits per code, on average over rows, with rule `loss`; scales come on top."""
    clusters: Width = 4
    """With rule `clusters`: how many widths; the most frequent tokens have the highest."""
    ratio: Annotated[Number, Field(ge=1, le=1000)] = 2.0
    """With rule `clusters`: how many times as many rows each has as the one before."""
    min_bits: Width = 1
    """Of any row; with rule `clusters` of the last cluster."""
    max_bits: Width = MAX_BITS
    """Of any row."""

    @model_validator(mode="after")
    def _check_bits(self) -> "RowsSection":
        if self.min_bits > self.max_bits:
            raise ValueError(f"min_bits, {self.min_bits}, is above max_bits, {self.max_bits}")
        if self.rule == "loss":
            self._check_average()
            return self
        if self.average_bits is not None:
            raise ValueError(
                "average_bits is for rule loss; with clusters it follows from clusters, ratio and "
                "min_bits: leave it out"
            )
        if self.min_bits + self.clusters - 1 > self.max_bits:
            raise ValueError(
                f"{self.clusters} clusters from min_bits {self.min_bits} on reach "
                f"{self.min_bits + self.clusters - 1} bits; max_bits is {self.max_bits}"
            )
        return self

    def _check_average(self) -> None:
        if self.average_bits is None:
            raise ValueError("average_bits is missing; say how many bits a row has on average")
        if not self.min_bits <= self.average_bits <= self.max_bits:
            raise ValueError(
                f"average_bits, {self.average_bits:g}, is outside of min_bits, {self.min_bits}, to "
                f"max_bits, {self.max_bits}"
            )
