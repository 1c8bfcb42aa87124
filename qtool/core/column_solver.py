"""GPTQ over any grid whose levels are multiples of one scale: feedback column by column, a polish.

Source: Frantar et al. 2022 (arXiv 2210.17323). Beyond it: groups are static and the order of the
columns is undone inside the solver, so nothing changes at run time; the grid of each group is
fitted with the importance that the Hessian gives its columns; codes and scales are polished under
the Hessian afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qtool.core import grouping, hessian, layout
from qtool.core.error_feedback import encode_columns, feed_forward, scaled_errors
from qtool.core.grids import AffineGrid, Span
from qtool.core.polish import polish
from qtool.scheme import Shape2D, WeightScheme

Order = Literal["activation", "group", "natural"]
SMALLEST_RATIO = 0.4
FitGroups = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(groups (rows, num_groups, group_size), importance that broadcasts) -> scales, zero points, both
(rows, num_groups)."""
MakeGrid = Callable[[Tensor, Tensor, int, Span], AffineGrid]
"""(scales, zero points, both (num_groups, row_groups) float32, bits, span) -> the grid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnOptions:
    """How columns are solved; a method's options say what each means."""

    damping: float
    order: Order
    polish_rounds: int
    column_block: int


@dataclass(frozen=True, slots=True)
class SolvedColumns:
    """A solved layer, in rows of groups as formats pack it."""

    codes: Tensor  # (rows, num_groups, group_size) uint8
    scales: Tensor  # (rows, num_groups) float16
    zero_points: Tensor  # (rows, num_groups) uint8
    damping: float
    """That the Hessian was factored with; NaN: it wasn't."""
    fallback: str | None
    """Says why, where it wasn't."""


def clip_ratios(count: int, only: float | None) -> list[float]:
    """Return fractions of a group's range to try: `only` one, or so many, from 1 down to 0.4."""
    if only is not None:
        return [only]
    step = (1 - SMALLEST_RATIO) / max(count - 1, 1)
    return [1 - i * step for i in range(count)]


@dataclass(frozen=True, slots=True)
class ColumnSolver:
    """The solver of one kind of grid."""

    fit: FitGroups
    grid: MakeGrid
    options: ColumnOptions

    def solve(self, weight: Tensor, statistics: Tensor, scheme: WeightScheme) -> SolvedColumns:
        """Quantize a weight with the Hessian of its inputs.

        Args:
            weight: (out_features, in_features) float32.
            statistics: The Hessian, (in_features, in_features) float32.
            scheme: Bits and grouping.
        """
        order = self._order(weight, statistics, scheme)
        factor = hessian.factorize(statistics, damping=self.options.damping, order=order)
        # With an identity all columns weigh the same and none passes its error on: plain rounding.
        upper = torch.eye(len(order), device=order.device) if factor is None else factor.upper
        importance = (upper.diagonal() ** -2)[order.argsort()]
        grid = self._fitted(weight, importance, scheme)
        codes = self._fed(weight, upper, order, grid, scheme)
        if factor is None:
            reason = (
                "the Hessian can't be factored even with a damping of 1; rounded to nearest instead"
            )
            return _solved_columns(grid, codes, scheme, float("nan"), reason)
        edges = layout.edges_of(scheme, Shape2D(*weight.shape))
        columns, rounds = weight.T.contiguous(), self.options.polish_rounds
        polish(grid, edges, columns, codes, factor.hessian, rounds=rounds)
        return _solved_columns(grid, codes, scheme, factor.damping, None)

    def _order(self, weight: Tensor, statistics: Tensor, scheme: WeightScheme) -> Tensor:
        """Return the order in which columns are solved."""
        if self.options.order == "activation":
            return hessian.act_order(statistics)
        if self.options.order == "group":
            size = layout.edges_of(scheme, Shape2D(*weight.shape))[1]
            return hessian.group_order(statistics, size)
        return torch.arange(len(statistics), device=statistics.device)

    def _fitted(self, weight: Tensor, importance: Tensor, scheme: WeightScheme) -> AffineGrid:
        """Fit the grid of every group on the original weights."""
        shape = Shape2D(*weight.shape)
        groups = grouping.split(grouping.to_rows(weight, scheme), scheme.group_size)
        if scheme.group_dim == "in_features":
            by_group = grouping.split(importance, scheme.group_size)
        else:  # within a column all rows weigh the same
            length = scheme.grouped_length(shape)
            by_group = grouping.valid(length, scheme.group_size, groups.device).float()
        scales, zeros = self.fit(groups, by_group)
        return self.grid(
            layout.to_columns(scales.float(), scheme).contiguous(),
            layout.to_columns(zeros.float(), scheme).contiguous(),
            scheme.num_bits,
            layout.span_of(scheme, shape),
        )

    def _fed(
        self, weight: Tensor, upper: Tensor, order: Tensor, grid: AffineGrid, scheme: WeightScheme
    ) -> Tensor:
        """Run the error feedback; return codes (in_features, out_features) in natural order."""
        size = layout.edges_of(scheme, Shape2D(*weight.shape))[1]
        groups = (order // size).tolist()
        work = weight.T[order].contiguous()
        codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
        edges = [*range(0, len(work), self.options.column_block), len(work)]

        def solve(start: int, stop: int, block: Tensor, factor: Tensor) -> Tensor:
            tables = grid.tables(groups[start:stop])
            codes[start:stop], levels = encode_columns(block, factor, tables, grid.pick)
            return scaled_errors(block, levels, factor)

        feed_forward(work, upper, edges, solve)
        return codes[order.argsort()].contiguous()


def _solved_columns(
    grid: AffineGrid, codes: Tensor, scheme: WeightScheme, damping: float, fallback: str | None
) -> SolvedColumns:
    return SolvedColumns(
        codes=layout.split_codes(codes, scheme),
        scales=layout.to_columns(grid.scales, scheme).to(torch.float16),
        zero_points=layout.to_columns(grid.zero_points, scheme).to(torch.uint8),
        damping=damping,
        fallback=fallback,
    )
