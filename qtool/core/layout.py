"""Between the two ways of looking at a layer: rows of groups, and columns first."""

from torch import Tensor

from qtool.core import grouping
from qtool.core.grids import Span
from qtool.scheme import Shape2D, WeightScheme

RUN = 8
"""Rows of gate, then of up, that alternate where both are one weight."""


def edges_of(scheme: WeightScheme, shape: Shape2D) -> list[int]:
    """Return the boundaries of the groups of columns, 0 .. in_features.

    Groups along out_features lie within one column, so each column is a group.
    """
    size = 1
    if scheme.group_dim == "in_features":
        size = min(scheme.group_size or shape.in_features, shape.in_features)
    return [*range(0, shape.in_features, size), shape.in_features]


def span_of(scheme: WeightScheme, shape: Shape2D) -> Span:
    """Return how rows share parameters."""
    if scheme.group_dim == "in_features":
        return Span(1, shape.out_features)
    size = min(scheme.group_size or shape.out_features, shape.out_features)
    return Span(size, shape.out_features)


def to_columns(parameters: Tensor, scheme: WeightScheme) -> Tensor:
    """Bring (rows, num_groups, ...) parameters of rows of groups to columns first, or back.

    For in_features that exchanges the two dimensions: (num_groups, rows, ...). For out_features a
    row of groups already is a column: (in_features, row_groups, ...).
    """
    return parameters.transpose(0, 1) if scheme.group_dim == "in_features" else parameters


def split_codes(codes: Tensor, scheme: WeightScheme) -> Tensor:
    """Cut codes (in_features, out_features) into rows of groups (rows, num_groups, group_size)."""
    rows = codes.T if scheme.group_dim == "in_features" else codes
    return grouping.split(rows, scheme.group_size)


def side_by_side(y: Tensor) -> Tensor:
    """Return the outputs (..., 2 n) of rows that alternate in runs: those of gate, then of up."""
    return y.unflatten(-1, (-1, 2, RUN)).transpose(-3, -2).flatten(-3)
