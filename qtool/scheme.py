"""WeightScheme: how the numbers of one weight are grouped and how wide they are. Torch-free."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from qtool.errors import SchemeError
from qtool.wording import quoted

GroupDim = Literal["in_features", "out_features"]
GROUP_DIMS: tuple[GroupDim, ...] = ("in_features", "out_features")
MAX_BITS = 8


class Shape2D(NamedTuple):
    """Shape of a linear weight, as torch stores it."""

    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightScheme:
    """Bits and grouping of one weight; hashable, written into recipes and checkpoints.

    Raises:
        SchemeError: a field is outside what every format can hold.
    """

    num_bits: int
    """Bits per code, or number of bit planes: 1 to 8."""
    group_size: int | None = 128
    """Neighbours that share scales; None: one group spans the whole dimension."""
    group_dim: GroupDim = "in_features"
    """Dimension along which a group runs."""
    symmetric: bool = False
    """No zero point (affine) or no offset (binary coding)."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_bits <= MAX_BITS:
            raise SchemeError(f"num_bits is {quoted(self.num_bits)}; allowed are 1 to {MAX_BITS}.")
        if self.group_size is not None and self.group_size < 1:
            raise SchemeError(
                f"group_size is {quoted(self.group_size)}; allowed are 1 and more, "
                "or null for one group per row."
            )
        if self.group_dim not in GROUP_DIMS:
            raise SchemeError(
                f"group_dim is {quoted(self.group_dim)}; allowed are {' and '.join(GROUP_DIMS)}."
            )

    def grouped_length(self, shape: Shape2D) -> int:
        """Return the length of the dimension along which groups run."""
        return getattr(shape, self.group_dim)

    def num_rows(self, shape: Shape2D) -> int:
        """Return the length of the other dimension: how many rows of groups there are."""
        return shape.out_features if self.group_dim == "in_features" else shape.in_features

    def num_groups(self, shape: Shape2D) -> int:
        """Return the number of groups per row; the last one may be short."""
        length = self.grouped_length(shape)
        return -(-length // (self.group_size or length))
