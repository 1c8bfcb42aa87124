"""GPTQ: uniform grids, column by column, each error absorbed by the columns that are left.

Source: Frantar et al. 2022 (arXiv 2210.17323). Beyond it: groups are static and the order of the
columns is undone inside the solver, so nothing changes at run time; the grid of each group is
searched with the importance that the Hessian gives its columns; codes and scales are polished
under the Hessian afterwards.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.base import LayerProblem, LayerSolution, Method
from qtool.core import affine, grouping, hessian, layout, metrics
from qtool.core.error_feedback import encode_columns, feed_forward, scaled_errors
from qtool.core.grids import AffineGrid
from qtool.core.polish import polish
from qtool.formats import affine as affine_format
from qtool.recipe.values import Number, WholeNumber
from qtool.scheme import Shape2D, WeightScheme

Order = Literal["activation", "group", "natural"]
SMALLEST_RATIO = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqOptions:
    """Options of `gptq`."""

    damping: Annotated[Number, Field(ge=hessian.MIN_DAMPING, le=hessian.MAX_DAMPING)] = 0.01
    """Fraction of the mean diagonal added to the Hessian; raised tenfold until it factors."""
    order: Order = "activation"
    """Columns by descending diagonal, the same but group by group, or as they are."""
    clip_candidates: Annotated[WholeNumber, Field(ge=1, le=1000)] = 30
    """Clip ratios tried for each group, from 1 down to 0.4; 1 tries the whole range only."""
    clip_ratio: Annotated[Number, Field(ge=1e-3, le=1)] | None = None
    """One clip ratio for all groups, in place of those tried; null: each has its best."""
    polish_rounds: Annotated[WholeNumber, Field(ge=0, le=1000)] = 3
    """Rounds of coordinate descent on codes and least squares on scales; 0 is plain GPTQ."""
    column_block: Annotated[WholeNumber, Field(ge=1, le=1 << 20)] = 128
    """Columns between two updates of all later ones; changes speed, not the result."""


def quantize_gptq(problem: LayerProblem, options: GptqOptions) -> LayerSolution:
    """Quantize one weight with the Hessian of its inputs."""
    scheme, shape = problem.scheme, Shape2D(*problem.weight.shape)
    statistics = problem.statistics["hessian"]
    order = _order(statistics, scheme, shape, options)
    factor = hessian.factorize(statistics, damping=options.damping, order=order)
    # With an identity all columns weigh the same and none passes its error on: plain rounding.
    upper = torch.eye(len(order), device=order.device) if factor is None else factor.upper
    importance = (upper.diagonal() ** -2)[order.argsort()]
    grid = _fit(problem, importance, options)
    codes = _feed(problem, upper, order, grid, options)
    if factor is None:
        reason = (
            "the Hessian can't be factored even with a damping of 1; rounded to nearest instead"
        )
        return _solution(problem, grid, codes, float("nan"), reason)
    polish(
        grid,
        layout.edges_of(scheme, shape),
        problem.weight.T.contiguous(),
        codes,
        factor.hessian,
        rounds=options.polish_rounds,
    )
    return _solution(problem, grid, codes, factor.damping, None)


def _order(
    statistics: Tensor, scheme: WeightScheme, shape: Shape2D, options: GptqOptions
) -> Tensor:
    """Return the order in which columns are solved."""
    if options.order == "activation":
        return hessian.act_order(statistics)
    if options.order == "group":
        return hessian.group_order(statistics, layout.edges_of(scheme, shape)[1])
    return torch.arange(len(statistics), device=statistics.device)


def _fit(problem: LayerProblem, importance: Tensor, options: GptqOptions) -> AffineGrid:
    """Search the grid of every group on the original weights."""
    scheme, shape = problem.scheme, Shape2D(*problem.weight.shape)
    groups = grouping.split(grouping.to_rows(problem.weight, scheme), scheme.group_size)
    if scheme.group_dim == "in_features":
        by_group = grouping.split(importance, scheme.group_size)
    else:  # within a column all rows weigh the same
        length = scheme.grouped_length(shape)
        by_group = grouping.valid(length, scheme.group_size, groups.device).float()
    step = (1 - SMALLEST_RATIO) / max(options.clip_candidates - 1, 1)
    tried = [1 - i * step for i in range(options.clip_candidates)]
    scales, zeros = affine.fit_search(
        groups,
        by_group,
        num_bits=scheme.num_bits,
        symmetric=scheme.symmetric,
        clip_ratios=tried if options.clip_ratio is None else [options.clip_ratio],
    )
    return AffineGrid(
        layout.to_columns(scales.float(), scheme).contiguous(),
        layout.to_columns(zeros.float(), scheme).contiguous(),
        scheme.num_bits,
        layout.span_of(scheme, shape),
    )


def _feed(
    problem: LayerProblem, upper: Tensor, order: Tensor, grid: AffineGrid, options: GptqOptions
) -> Tensor:
    """Run the error feedback; return codes (in_features, out_features) in natural order."""
    shape = Shape2D(*problem.weight.shape)
    size = layout.edges_of(problem.scheme, shape)[1]
    groups = (order // size).tolist()
    work = problem.weight.T[order].contiguous()
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    edges = [*range(0, len(work), options.column_block), len(work)]

    def solve(start: int, stop: int, block: Tensor, factor: Tensor) -> Tensor:
        tables = grid.tables(groups[start:stop])
        codes[start:stop], levels = encode_columns(block, factor, tables, grid.pick)
        return scaled_errors(block, levels, factor)

    feed_forward(work, upper, edges, solve)
    return codes[order.argsort()].contiguous()


def _solution(
    problem: LayerProblem, grid: AffineGrid, codes: Tensor, damping: float, fallback: str | None
) -> LayerSolution:
    scheme, shape = problem.scheme, Shape2D(*problem.weight.shape)
    tensor = affine_format.encode_affine(
        layout.split_codes(codes, scheme),
        layout.to_columns(grid.scales, scheme).to(torch.float16),
        layout.to_columns(grid.zero_points, scheme).to(torch.uint8),
        scheme,
        shape,
    )
    quantized = affine_format.CODEC.dequantize(tensor, torch.float32)
    measured = metrics.of_layer(problem.weight, quantized, problem.statistics["hessian"])
    return LayerSolution(tensor, {**measured, "damping": damping}, fallback)


METHOD = Method(
    summary="Uniform grids with error feedback under the Hessian of the inputs (affine).",
    options=GptqOptions,
    solve=quantize_gptq,
    layout=lambda scheme, shape, _options: affine_format.CODEC.layout(scheme, shape),
    needs=frozenset({"hessian"}),
)
