"""Binary grids of single columns: what groups along out_features have, many columns at a time.

A column alone is too little work for one operation each: levels of many are sorted, found and
fitted together, and the column loop reads those of the column where it is.
"""

import torch
from torch import Tensor

from qtool.core import coded_scales, grouping
from qtool.core.grids import BinaryGrid, Span, Tables
from qtool.core.linalg import equations_together, fit_together
from qtool.core.multiples import best_in_turn

UNKNOWNS_AT_ONCE = 128
"""Of columns that are fitted together: one system of equations per group of rows."""


def pick_columns(tables: Tables, column: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest codes and levels, ties up.

    Tables are levels, ascending, their codes and the middles between them, each
    (columns, places, row_groups), and the rows of a group, one number on the CPU.
    """
    levels, codes, middles, size = tables
    groups = grouping.split(values, int(size))  # (row_groups, size)
    middle = middles[column].unsqueeze(-1)
    above = middle.new_empty(len(middle), *groups.shape)
    places = torch.ge(groups, middle, out=above).sum(0, keepdim=True).long()
    found = (each[column].unsqueeze(-1).expand(-1, -1, int(size)) for each in (codes, levels))
    code, level = (grouping.join(each.gather(0, places), len(values))[0] for each in found)
    return code, level


class ColumnGrid(BinaryGrid):
    """A binary grid whose groups are runs of rows within a column."""

    pick = staticmethod(pick_columns)

    def __init__(self, parameters: Tensor, *, offset: bool, span: Span) -> None:
        """Sort the levels; the arguments are those of a binary grid."""
        super().__init__(parameters, offset=offset, span=span)
        self._size = torch.tensor(span.size)

    @property
    def at_once(self) -> int:
        """Return how many columns are walked and fitted together."""
        return max(1, UNKNOWNS_AT_ONCE // self.parameters.shape[1])

    def tables(self, groups: list[int]) -> Tables:
        """Return the tables of columns for `pick_columns`."""
        index = torch.tensor(groups, device=self.parameters.device)
        parts = (self._levels, self._codes, self._middles)
        return (*(part[index] for part in parts), self._size)

    def values_of(self, columns: Tensor, codes: Tensor) -> Tensor:
        """Return the levels of codes (columns, rows), float32; of the columns (columns,) int64."""
        table = torch.einsum("lu,cur->clr", self._table, self.parameters[columns])
        split = grouping.split(codes, self.span.size).long().unsqueeze(1)  # (columns, 1, groups, n)
        found = table.unsqueeze(-1).expand(-1, -1, -1, self.span.size).gather(1, split)
        return grouping.join(found.squeeze(1), codes.shape[1])

    def refit(self, columns: Tensor, codes: Tensor, matrix: Tensor, gradient: Tensor) -> None:
        """Move the parameters of columns, all at once, to where a quadratic loss is least.

        Args:
            columns: (columns,) int64.
            codes: (columns, rows) uint8; they stay.
            matrix: (columns, columns) float32: how the steps of two columns meet in the loss.
            gradient: (columns, rows) float32: half of it, at the levels of these codes.
        """
        basis = self.basis(0, codes)  # (unknowns, columns, rows)
        step = fit_together(basis.transpose(0, 1), matrix, -gradient, self.span.size)
        parameters = self.parameters[columns]
        parameters[:, : step.shape[1]] += step
        self.put(columns, parameters)

    def put(self, columns: Tensor, parameters: Tensor) -> None:
        """Replace the parameters of columns: (columns, unknowns, row_groups)."""
        self.parameters[columns] = parameters
        levels, codes, middles = self._sorted(parameters)
        self._levels[columns], self._codes[columns] = levels, codes
        self._middles[columns] = middles


class CodedColumnGrid(ColumnGrid):
    """A column grid whose parameters are multiples of one unit per column, see `coded_scales`."""

    def __init__(self, parameters: Tensor, row_scales: Tensor, *, offset: bool, span: Span) -> None:
        """Sort the levels; row scales are (columns, row_groups) float16, as of a coded grid."""
        super().__init__(parameters, offset=offset, span=span)
        self.row_scales = row_scales

    def refit(self, columns: Tensor, codes: Tensor, matrix: Tensor, gradient: Tensor) -> None:
        """Move each parameter of columns in turn to the best multiple; else as of a column grid."""
        basis = self.basis(0, codes).transpose(0, 1)  # (columns, unknowns, rows)
        normal, right = equations_together(basis, matrix, -gradient, self.span.size)
        (count, unknowns), num_bits = basis.shape[:2], self.parameters.shape[1] - 1
        units = coded_scales.units_of(self.row_scales[columns], num_bits)
        bounds = coded_scales.bounds_of(num_bits, right.device)
        lowest, highest = (bound[:unknowns].repeat(count) for bound in bounds)
        parameters = self.parameters[columns]
        old = parameters[:, :unknowns].flatten(0, 1)  # (columns * unknowns, row_groups)
        every = units.repeat_interleave(unknowns, 0)
        new = best_in_turn(normal, right, old, every, (lowest, highest))
        parameters[:, :unknowns] = new.unflatten(0, (count, unknowns))
        self.put(columns, parameters)

    def round(self) -> None:
        """Do nothing: the parameters are rounded."""
