"""Schemes: how weights are grouped and how wide they are, and how activations. Torch-free."""

from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from typing import Any, Literal, NamedTuple

from qtool.errors import SchemeError
from qtool.wording import quoted

GroupDim = Literal["in_features", "out_features"]
GROUP_DIMS: tuple[GroupDim, ...] = ("in_features", "out_features")
Granularity = Literal["token", "tensor"]
GRANULARITIES: tuple[Granularity, ...] = ("token", "tensor")
MAX_BITS = 8
MAX_SHIFT = 0.25
"""Of a rounding threshold, in steps: beyond it the nearest of three levels may be passed over."""


class Shape2D(NamedTuple):
    """Shape of a linear weight, as torch stores it."""

    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BitCode:
    """How planes are stored in fewer bits than they have; hashable.

    A network of XOR gates makes `num_outputs` bits of `num_inputs`, at every step of its clock.

    Raises:
        SchemeError: a field is outside what a network can be.
    """

    num_inputs: int
    """Stored bits per step, N_in: 1 and more."""
    num_outputs: int
    """Bits of planes per step, N_out: `num_inputs` and more."""
    registers: int = 0
    """Earlier inputs that the network sees as well, N_s."""
    kept: int = 0
    """Weights that aren't zero; 0: none is forced to be."""
    corrections: int = 0
    """Bits that the network doesn't give and whose places are stored."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_inputs <= self.num_outputs:
            raise SchemeError(
                f"{quoted(self.num_inputs)} bits become {quoted(self.num_outputs)} by an XOR "
                "network; 1 and more, and no fewer than they were, are meant."
            )
        if min(self.registers, self.kept, self.corrections) < 0:
            raise SchemeError(
                f"registers, kept and corrections of a code are {quoted(self.registers)}, "
                f"{quoted(self.kept)} and {quoted(self.corrections)}; 0 and more are meant."
            )

    def with_found(self, kept: int, corrections: int) -> "BitCode":
        """Return the same network with the numbers of what it was fitted to."""
        return replace(self, kept=kept, corrections=corrections)


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
    code: BitCode | None = field(default=None, repr=False)
    """How the planes are stored; None: as they are."""

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

    def plain(self) -> "WeightScheme":
        """Return the same bits and grouping of planes that are stored as they are."""
        return replace(self, code=None)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; `rows` and `code` are there if there are any."""
        values = asdict(self)
        values["rows"] = [list(each) for each in self.rows]
        for key in ("rows", "code"):
            if not values[key]:
                del values[key]
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

    def parameter_shape(self, shape: Shape2D) -> tuple[int, int]:
        """Return the stored shape of what groups have one of: as the groups lie in the weight."""
        rows, groups = self.num_rows(shape), self.num_groups(shape)
        return (rows, groups) if self.group_dim == "in_features" else (groups, rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationScheme:
    """How the inputs of a linear are quantized while it runs; hashable.

    Codes are symmetric integers, -(2^(k-1) - 1) to 2^(k-1) - 1, times a step.

    Raises:
        SchemeError: a field is outside what it can be.
    """

    num_bits: int = 8
    """2 to 8."""
    granularity: Granularity = "token"
    """`token`: each token has a step of its own, found as it comes (dynamic); `tensor`: all have
    `scale` (static)."""
    clip_ratio: float = 1.0
    """Per token: share of its largest absolute value that the codes cover, above 0 to 1."""
    rounding: float = 0.0
    """Shift of the threshold between neighbouring codes, in steps: above 0 towards 0."""
    scale: float | None = None
    """Per tensor: the step, above 0."""

    def __post_init__(self) -> None:
        if not 2 <= self.num_bits <= MAX_BITS:  # noqa: PLR2004 - a sign and a magnitude
            raise SchemeError(
                f"num_bits of activations is {quoted(self.num_bits)}; allowed are 2 to {MAX_BITS}."
            )
        if self.granularity not in GRANULARITIES:
            raise SchemeError(
                f"granularity of activations is {quoted(self.granularity)}; allowed are "
                f"{' and '.join(GRANULARITIES)}."
            )
        if not 0 < self.clip_ratio <= 1:
            raise SchemeError(
                f"clip_ratio of activations is {quoted(self.clip_ratio)}; above 0 to 1 is meant."
            )
        if not -MAX_SHIFT <= self.rounding <= MAX_SHIFT:
            raise SchemeError(
                f"rounding of activations is {quoted(self.rounding)}; -{MAX_SHIFT} to {MAX_SHIFT} "
                "is meant."
            )
        if (self.scale is None) != (self.granularity == "token"):
            raise SchemeError("activations per tensor have a scale, those per token have none.")
        if self.scale is not None and not (self.scale > 0 and isfinite(self.scale)):
            raise SchemeError(
                f"scale of activations is {quoted(self.scale)}; a number above 0 is meant."
            )

    @property
    def largest_code(self) -> int:
        """Return the largest code; the smallest is its negative."""
        return 2 ** (self.num_bits - 1) - 1

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticInputs:
    """What is known of inputs that get one step per tensor, before samples have given it."""

    clip_ratio: float = 1.0
    """Share of the range, as the recipe finds it, that the codes cover, above 0 to 1."""
    rounding: float = 0.0
    """As in `ActivationScheme`."""


InputScheme = ActivationScheme | StaticInputs | None
"""How the inputs of a linear are quantized, as far as a plan knows; None: they aren't."""


def _is_pair(value: object) -> bool:
    """Return whether it is a pair of positive whole numbers."""
    return (
        isinstance(value, tuple | list)
        and len(value) == 2  # noqa: PLR2004 - a pair
        and all(type(each) is int and each > 0 for each in value)
    )
