"""Grids: the levels that each group may use, as the Hessian-aware solvers see them.

Solvers walk over input columns, so everything is stored columns first: weights are (n, rows), and
the parameters of group k of all rows are contiguous. A grid answers three questions for one group
of columns: which level is nearest, which basis its values are linear in, and which parameters along
that basis are best.

Where groups run along in_features, a group is a run of columns and each row has its own
parameters. Where they run along out_features, a group is one column, and `Span` says how many
rows share parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.core import coded_scales, grouping
from qtool.core.binary_coding import design
from qtool.core.linalg import RIDGE, solve_spd
from qtool.core.multiples import best_in_turn


@dataclass(frozen=True, slots=True)
class Span:
    """How the rows of a layer share parameters: `size` neighbours each, the last group short."""

    size: int
    rows: int

    def expand(self, parameters: Tensor) -> Tensor:
        """Return parameters (..., row_groups) for each row: (..., rows)."""
        if self.size == 1:
            return parameters
        return parameters.repeat_interleave(self.size, dim=-1)[..., : self.rows]

    def pool(self, per_row: Tensor) -> Tensor:
        """Sum values (rows, ...) over the rows that share parameters: (row_groups, ...)."""
        if self.size == 1:
            return per_row
        return grouping.split(per_row.movedim(0, -1), self.size).sum(-1).movedim(-1, 0)


def within_factor_two(old: Tensor, new: Tensor) -> Tensor:
    """Return new scales, kept within a factor of two of the old ones: they stay positive."""
    return torch.minimum(torch.maximum(new, old / 2), old * 2)


Tables = tuple[Tensor, ...]
"""The levels of the columns of a block, as its `Pick` takes them."""
Pick = Callable[[Tables, int, Tensor], tuple[Tensor, Tensor]]
"""(tables, column of the block, values (rows,)) -> codes (rows,) uint8 and levels (rows,)."""


def pick_affine(tables: Tables, column: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest codes and levels; tables are scales, zero points and highest code."""
    scales, zeros, top = tables
    scale, zero = scales[column], zeros[column]
    codes = torch.minimum(torch.div(values, scale).add_(zero).round_().clamp_(min=0), top)
    return codes.to(torch.uint8), (codes - zero) * scale


def pick_binary(tables: Tables, column: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest codes and levels, ties up; tables are levels, their codes, middles."""
    del column  # all columns of a block are of one group
    levels, codes, middles = tables
    places = place_binary(middles, values, torch.empty_like(middles))
    return codes.gather(0, places).squeeze(0), levels.gather(0, places).squeeze(0)


def place_binary(middles: Tensor, values: Tensor, above: Tensor) -> Tensor:
    """Return the places of the nearest levels, ties up, (1, rows) int64.

    Args:
        middles: Between neighbouring levels, (places - 1, rows) float32, ascending.
        values: (rows,) or (1, rows) float32.
        above: Like `middles`; overwritten. Written as bool the comparison takes four times as long.
    """
    return torch.ge(values, middles, out=above).sum(0, keepdim=True).long()


@dataclass(slots=True)
class AffineGrid:
    """scale * (code - zero_point)."""

    scales: Tensor  # (num_groups, row_groups) float32, > 0
    zero_points: Tensor  # (num_groups, row_groups) float32, whole numbers
    num_bits: int
    span: Span

    pick = staticmethod(pick_affine)

    def tables(self, groups: list[int]) -> Tables:
        """Return scales and zero points (columns, rows) of groups of columns, the highest code."""
        index = torch.tensor(groups, device=self.scales.device)
        expand = self.span.expand
        top = torch.full((1,), float(self.top()), device=self.scales.device)
        return expand(self.scales[index]), expand(self.zero_points[index]), top

    def top(self) -> int:
        """Return the highest code that is whole steps from the zero point."""
        return int(2**self.num_bits) - 1

    def units(self, codes: Tensor, zero_points: Tensor) -> Tensor:
        """Return what codes mean in steps, float32; zero points broadcast."""
        return codes.float() - zero_points

    def values(self, group: int, codes: Tensor) -> Tensor:
        """Return the levels of codes (columns, rows) of one group, float32."""
        return self.basis(group, codes)[0] * self.span.expand(self.scales[group])

    def basis(self, group: int, codes: Tensor) -> Tensor:
        """Return what the values are linear in, (1, columns, rows): only the scale moves."""
        return self.units(codes, self.span.expand(self.zero_points[group])).unsqueeze(0)

    def moved(self, group: int, normal: Tensor, right: Tensor) -> Tensor:
        """Return the best scales that stay within a factor of two of what they were, and positive.

        Normal equations (row_groups, 1, 1) and (row_groups, 1) float64 are those of the step.
        """
        old = self.scales[group].unsqueeze(0)
        return within_factor_two(old, old + solve_spd(normal, right, ridge=RIDGE).T.float())

    def set(self, group: int, parameters: Tensor) -> None:
        """Replace the scales of a group."""
        self.scales[group] = parameters[0]

    def round(self) -> None:
        """Round the scales to float16."""
        self.scales = self.scales.to(torch.float16).float()


class BinaryGrid:
    """offset + sum of scales * signs; the levels of each group are kept sorted."""

    pick = staticmethod(pick_binary)

    def __init__(self, parameters: Tensor, *, offset: bool, span: Span | None = None) -> None:
        """Sort the levels.

        Args:
            parameters: (num_groups, num_bits + 1, row_groups) float32: scales, then the offset.
            offset: False: the offset stays zero.
            span: How rows share parameters; None: each has its own.
        """
        self.parameters = parameters
        self.offset = offset
        self.span = span or Span(1, parameters.shape[-1])
        self._table = design(parameters.shape[1] - 1, parameters.device, torch.float32)
        self._levels, self._codes, self._middles = self._sorted(parameters)

    def _sorted(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return levels ascending, their codes, and the middles: (num_groups, ., row_groups)."""
        levels, order = torch.einsum("lu,kur->klr", self._table, parameters).sort(dim=1)
        return levels, order.to(torch.uint8), (levels[:, 1:] + levels[:, :-1]) / 2

    def tables(self, groups: list[int]) -> Tables:
        """Return levels ascending, their codes and the middles; `groups` are all the same."""
        group = groups[0]
        expand = self.span.expand
        parts = (self._levels[group], self._codes[group], self._middles[group])
        return tuple(expand(part) for part in parts)

    def values(self, group: int, codes: Tensor) -> Tensor:
        """Return the levels of codes (columns, rows) of one group, float32."""
        table = self.span.expand(self._table @ self.parameters[group])  # (num_levels, rows)
        return table.gather(0, codes.long())

    def basis(self, group: int, codes: Tensor) -> Tensor:
        """Return what the values are linear in, (unknowns, columns, rows): signs, and ones."""
        del group
        unknowns = self._table.shape[1] - int(not self.offset)
        signs = self._table.T[:unknowns]
        return signs.index_select(1, codes.flatten().int()).unflatten(1, codes.shape)

    def moved(self, group: int, normal: Tensor, right: Tensor) -> Tensor:
        """Return the best parameters of a group.

        Normal equations (row_groups, unknowns, unknowns) and (row_groups, unknowns) float64 are
        those of the step from what they are.
        """
        step = solve_spd(normal, right, ridge=RIDGE).T.float()
        parameters = self.parameters[group].clone()
        parameters[: len(step)] += step
        return parameters

    def set(self, group: int, parameters: Tensor) -> None:
        """Replace the parameters of a group."""
        self.parameters[group] = parameters
        levels, codes, middles = self._sorted(parameters.unsqueeze(0))
        self._levels[group], self._codes[group], self._middles[group] = levels, codes, middles

    def round(self) -> None:
        """Round scales and offsets to float16."""
        self.parameters = self.parameters.to(torch.float16).float()
        self._levels, self._codes, self._middles = self._sorted(self.parameters)


class CodedGrid(BinaryGrid):
    """A binary grid whose parameters are multiples of one unit per row, see `coded_scales`."""

    def __init__(
        self, parameters: Tensor, row_scales: Tensor, *, offset: bool, span: Span | None = None
    ) -> None:
        """Sort the levels.

        Args:
            parameters: As for a binary grid, and multiples already.
            row_scales: (num_groups, row_groups) float16, of the row that each group lies in.
            offset: As for a binary grid.
            span: As for a binary grid.
        """
        super().__init__(parameters, offset=offset, span=span)
        self.row_scales = row_scales

    def moved(self, group: int, normal: Tensor, right: Tensor) -> Tensor:
        """Return better parameters of a group: each in turn is the best multiple given the rest."""
        old, num_bits = self.parameters[group], self.parameters.shape[1] - 1
        units = coded_scales.units_of(self.row_scales[group], num_bits)
        bounds = coded_scales.bounds_of(num_bits, right.device)
        return best_in_turn(normal, right, old, units.expand(right.shape[1], -1), bounds)

    def round(self) -> None:
        """Do nothing: the parameters are rounded."""


Grid = AffineGrid | BinaryGrid
"""Levels of all groups of one layer. Parameters of a group are (unknowns, row_groups)."""
