"""The section `rows` of a recipe's embedding or head: bits per row by frequency. Torch-free."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qtool.recipe.values import Number, Section, WholeNumber
from qtool.scheme import MAX_BITS

Width = Annotated[WholeNumber, Field(ge=1, le=MAX_BITS)]


def cluster_sizes(num_rows: int, clusters: int, ratio: float) -> list[int]:
    """Return how many rows each cluster has: each `ratio` times as many as the one before.

    Rounded, and what remains in the last. Source: Extremely Low Bit Transformer, Algorithm 1.
    """
    shares = [ratio**index for index in range(clusters)]
    sizes: list[int] = []
    for share in shares[:-1]:
        wanted = round(num_rows * share / sum(shares))
        sizes.append(min(wanted, num_rows - sum(sizes)))
    return [*sizes, num_rows - sum(sizes)]


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

    def expected(self, num_rows: int) -> tuple[tuple[int, int], ...]:
        """Return (bits, number of rows) by descending bits, as far as it is known without data.

        With rule `loss` these are the two widths next to the average; what is chosen has that
        average too, and takes a few percent more: scales of wide rows have more bits.
        """
        if self.average_bits is None:
            widths = range(self.min_bits + self.clusters - 1, self.min_bits - 1, -1)
            pairs = zip(widths, cluster_sizes(num_rows, self.clusters, self.ratio), strict=True)
            return tuple((bits, count) for bits, count in pairs if count)
        low = int(self.average_bits)
        high = int((self.average_bits - low) * num_rows)
        return tuple(pair for pair in ((low + 1, high), (low, num_rows - high)) if pair[1])

    @model_validator(mode="after")
    def _check_bits(self) -> "RowsSection":
        if self.min_bits > self.max_bits:
            raise ValueError(f"min_bits, {self.min_bits}, is above max_bits, {self.max_bits}")
        if self.rule == "loss":
            self._check_average()
            for name in ("clusters", "ratio"):
                self.refuse_unread(name, needs="rule clusters")
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
