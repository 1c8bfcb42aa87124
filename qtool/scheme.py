"""WeightScheme: how the numbers of one weight are grouped and how wide they are. Torch-free."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

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
    rows: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    """Classes of rows with bits of their own: (num_bits, number of rows), the highest first, which
    is the scheme's `num_bits`; empty: all rows have `num_bits`."""

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
        if self.rows:
            self._check_rows()

    def _check_rows(self) -> None:
        pairs = tuple(map(tuple, self.rows)) if all(map(_is_pair, self.rows)) else ()
        bits = [num_bits for num_bits, _ in pairs]
        if not pairs or bits != sorted(set(bits), reverse=True) or not 1 <= bits[-1] <= MAX_BITS:
            raise SchemeError(
                f"rows is {quoted(self.rows)}; pairs of bits, 1 to {MAX_BITS} and descending, and "
                "of how many rows have them, 1 and more, are meant."
            )
        if bits[0] != self.num_bits or self.group_dim != "in_features":
            raise SchemeError(
                f"num_bits is {self.num_bits} and groups run along {self.group_dim}; with rows of "
                f"{bits[0]} bits at most, {bits[0]} and in_features are meant."
            )
        object.__setattr__(self, "rows", pairs)

    def classes(self, shape: Shape2D) -> tuple[tuple[int, int], ...]:
        """Return (num_bits, number of rows) of each class of rows; without `rows`, of the one."""
        return self.rows or ((self.num_bits, shape.out_features),)

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the bits that rows have, descending; without `rows`, `num_bits` alone."""
        return tuple(num_bits for num_bits, _ in self.rows) or (self.num_bits,)

    def uniform(self, num_bits: int) -> "WeightScheme":
        """Return the same grouping with one width for all rows."""
        return replace(self, num_bits=num_bits, rows=())

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; `rows` is there if there are any."""
        values = asdict(self)
        if not self.rows:
            del values["rows"]
        return values

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


def _is_pair(value: object) -> bool:
    """Return whether it is a pair of positive whole numbers."""
    return (
        isinstance(value, tuple | list)
        and len(value) == 2  # noqa: PLR2004 - a pair
        and all(type(each) is int and each > 0 for each in value)
    )
