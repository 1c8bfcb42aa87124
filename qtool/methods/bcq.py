"""Binary-coding quantization (BCQ): each group is an offset plus a sum of scaled sign planes.

Without calibration data: several starts, alternating refinement, the best start of each group
(sources in `qtool.core.alternating`). With it (BCQ-H): the same starts, weighted by what the
Hessian says of each column, then codes and levels under error feedback, then a polish of both
under the Hessian (sources in `qtool.core.binary_feedback` and `qtool.core.polish`).
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.base import Codec, LayerProblem, LayerSolution, Method, QuantizedTensor
from qtool.core import (
    alternating,
    binary_coding,
    coded_scales,
    grouping,
    hessian,
    layout,
    metrics,
)
from qtool.core.binary_feedback import solve_columns, solve_groups
from qtool.core.column_grids import CodedColumnGrid, ColumnGrid
from qtool.core.grids import BinaryGrid, CodedGrid
from qtool.core.hessian import Factor
from qtool.core.polish import polish
from qtool.errors import RecipeError
from qtool.formats import binary_coding as binary_format
from qtool.formats import coded_scales as coded_format
from qtool.recipe.values import Number, WholeNumber
from qtool.scheme import Shape2D


@dataclass(frozen=True, slots=True, kw_only=True)
class BcqOptions:
    """Options of `bcq`."""

    rounds: Annotated[WholeNumber, Field(ge=0, le=1000)] = 30
    """Upper bound on the alternations of codes and scales; a group stops when it has converged."""
    clip_ratios: Annotated[
        tuple[Annotated[Number, Field(ge=1e-3, le=1)], ...], Field(max_length=100)
    ] = (1.0, 0.85, 0.7)
    """Uniform starts: fractions of the group's range that they cover."""
    clip_ratio: Annotated[Number, Field(ge=1e-3, le=1)] = 1.0
    """Fraction of the group's range that weights are drawn into before levels are fitted to them;
    codes are those of the weights as they are."""
    greedy: bool = True
    """Also start from the greedy solution."""
    damping: Annotated[Number, Field(ge=hessian.MIN_DAMPING, le=hessian.MAX_DAMPING)] = 0.01
    """Calibrated: fraction of the mean diagonal added to the Hessian; raised until it factors."""
    start_powers: Annotated[
        tuple[Annotated[Number, Field(ge=0, le=4)], ...], Field(min_length=1, max_length=100)
    ] = (0.0, 0.5, 1.0)
    """Calibrated: starts fitted with the columns' importance to each of these powers."""
    iterations: Annotated[WholeNumber, Field(ge=1, le=1000)] = 5
    """Calibrated: alternations of codes and levels within a group, under error feedback."""
    polish_rounds: Annotated[WholeNumber, Field(ge=0, le=1000)] = 3
    """Calibrated: rounds of coordinate descent on codes and least squares on scales."""
    scales: Literal["float16", "coded"] = "float16"
    """float16: format `binary_coding`; coded: format `coded_scales`, whose scales have few bits."""

    def __post_init__(self) -> None:
        if not self.clip_ratios and not self.greedy:
            raise RecipeError("No start is left: give clip_ratios, or set greedy to true.")


def quantize_bcq(problem: LayerProblem, options: BcqOptions) -> LayerSolution:
    """Quantize one weight, under the Hessian of its inputs if there is one."""
    statistics = problem.statistics.get("hessian")
    if statistics is None:
        return _data_free(problem, options)
    size = layout.edges_of(problem.scheme, Shape2D(*problem.weight.shape))[1]
    order = hessian.group_order(statistics, size)
    factor = hessian.factorize(statistics, damping=options.damping, order=order)
    if factor is None:
        reason = "the Hessian can't be factored even with a damping of 1; solved without it"
        return _data_free(problem, options, fallback=reason)
    return _calibrated(problem, factor, order, options)


def _fit(problem: LayerProblem, importance: Tensor, options: BcqOptions) -> Tensor:
    """Fit every group on its own: (rows, num_groups, num_bits + 1) float32, offset last.

    Importance is (num_groups, group_size), zero for padding.
    """
    scheme = problem.scheme
    rows = grouping.split(grouping.to_rows(problem.weight, scheme), scheme.group_size)
    if options.clip_ratio < 1:
        low, high = rows.aminmax(dim=-1, keepdim=True)
        rows = rows.clamp(options.clip_ratio * low, options.clip_ratio * high)
    scales, offsets, _ = alternating.fit(
        rows.flatten(0, 1),
        importance.repeat(len(rows), 1),
        alternating.FitOptions(
            num_bits=scheme.num_bits,
            offset=not scheme.symmetric,
            rounds=options.rounds,
            clip_ratios=options.clip_ratios,
            greedy=options.greedy,
        ),
    )
    theta = torch.cat([scales, offsets.unsqueeze(-1)], dim=-1)
    return theta.unflatten(0, rows.shape[:2]).float()


def _real(problem: LayerProblem) -> Tensor:
    """Return which elements of the groups aren't padding, as importance."""
    scheme = problem.scheme
    length = scheme.grouped_length(Shape2D(*problem.weight.shape))
    return grouping.valid(length, scheme.group_size, problem.weight.device).float()


def _data_free(
    problem: LayerProblem, options: BcqOptions, *, fallback: str | None = None
) -> LayerSolution:
    # Round the parameters first: codes must be nearest for the levels that are stored.
    theta = _fit(problem, _real(problem), options).to(torch.float16)
    return _solution(problem, theta, _nearest(problem, theta), options, fallback=fallback)


def _nearest(problem: LayerProblem, theta: Tensor) -> Tensor:
    """Return the codes of the nearest levels, in rows of groups."""
    scheme, flat = problem.scheme, theta.flatten(0, 1)
    groups = grouping.split(grouping.to_rows(problem.weight, scheme), scheme.group_size)
    codes = binary_coding.assign(groups.flatten(0, 1), flat[:, :-1], flat[:, -1])
    return codes.view(groups.shape)


def _calibrated(
    problem: LayerProblem, factor: Factor, order: Tensor, options: BcqOptions
) -> LayerSolution:
    scheme, shape = problem.scheme, Shape2D(*problem.weight.shape)
    edges, span = layout.edges_of(scheme, shape), layout.span_of(scheme, shape)
    columns = problem.weight.T.contiguous()
    if scheme.group_dim == "in_features":
        codes, parameters = _by_group(problem, factor, order, edges, options)
        grid = BinaryGrid(parameters, offset=not scheme.symmetric)
    else:
        start = _fit(problem, _real(problem), options).transpose(1, 2).contiguous()
        grid = ColumnGrid(start, offset=not scheme.symmetric, span=span)
        iterations = options.iterations
        codes = solve_columns(columns[order], factor.upper, grid, order, iterations=iterations)
        codes = codes[order.argsort()].contiguous()
    polish(grid, edges, columns, codes, factor.hessian, rounds=options.polish_rounds)
    theta = layout.to_columns(grid.parameters.transpose(1, 2), scheme)
    return _solution(problem, theta, layout.split_codes(codes, scheme), options, factor)


def _by_group(
    problem: LayerProblem, factor: Factor, order: Tensor, edges: list[int], options: BcqOptions
) -> tuple[Tensor, Tensor]:
    """Solve group by group; return codes and parameters in natural order."""
    scheme = problem.scheme
    size = edges[1]
    importance = (factor.upper.diagonal() ** -2)[order.argsort()]
    starts = []
    for power in options.start_powers:
        weights = grouping.split(importance**power, scheme.group_size) * _real(problem)
        theta = _fit(problem, weights / weights.max(), options)
        starts.append(layout.to_columns(theta, scheme).transpose(1, 2).contiguous())
    groups = order[torch.tensor(edges[:-1], device=order.device)] // size  # group at each place
    codes, parameters = solve_groups(
        problem.weight.T[order].contiguous(),
        factor.upper,
        edges,
        [start[groups] for start in starts],
        offset=not scheme.symmetric,
        iterations=options.iterations,
    )
    natural = torch.empty_like(parameters)
    natural[groups] = parameters
    return codes[order.argsort()].contiguous(), natural


def _solution(
    problem: LayerProblem,
    theta: Tensor,
    codes: Tensor,
    options: BcqOptions,
    factor: Factor | None = None,
    *,
    fallback: str | None = None,
) -> LayerSolution:
    """Bring the planes to their stored order and pack; theta is (rows, num_groups, unknowns)."""
    scheme, shape = problem.scheme, Shape2D(*problem.weight.shape)
    theta, codes = _ordered(theta.to(torch.float16), codes)
    if options.scales == "coded":
        tensor = _coded(problem, theta.float(), codes, options, factor)
    else:
        scales, offsets = theta[..., :-1], theta[..., -1]
        tensor = binary_format.encode_binary(codes, scales, offsets, scheme, shape)
    quantized = _codec_of(options).dequantize(tensor, torch.float32)
    measured = metrics.of_layer(problem.weight, quantized, problem.statistics.get("hessian"))
    notes = {} if factor is None else {"damping": factor.damping}
    return LayerSolution(tensor, {**measured, **notes}, fallback)


def _ordered(theta: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return parameters and codes, rows of groups, with plane scales >= 0 and descending."""
    flat = theta.flatten(0, 1)
    scales, ordered = binary_coding.canonical(flat[:, :-1], codes.flatten(0, 1))
    return torch.cat([scales, flat[:, -1:]], 1).view(theta.shape), ordered.view(codes.shape)


def _coded(
    problem: LayerProblem, theta: Tensor, codes: Tensor, options: BcqOptions, factor: Factor | None
) -> QuantizedTensor:
    """Round parameters to multiples of a unit, and find codes for these."""
    row_scales = coded_scales.fit_row_scales(theta)
    theta = coded_scales.rounded(theta, row_scales)
    if factor is None:
        codes = _nearest(problem, theta)
    else:
        theta, codes = _polished(problem, theta, codes, row_scales, factor, options)
    shape = Shape2D(*problem.weight.shape)
    return coded_format.encode_coded(codes, theta, row_scales, problem.scheme, shape)


def _polished(
    problem: LayerProblem,
    theta: Tensor,
    codes: Tensor,
    row_scales: Tensor,
    factor: Factor,
    options: BcqOptions,
) -> tuple[Tensor, Tensor]:
    """Polish codes and multiples of a unit under the Hessian; all are rows of groups."""
    scheme, shape = problem.scheme, Shape2D(*problem.weight.shape)
    of_groups = layout.to_columns(row_scales.unsqueeze(1).expand(theta.shape[:2]), scheme)
    parameters = layout.to_columns(theta, scheme).transpose(1, 2).contiguous()
    span = layout.span_of(scheme, shape)
    along_rows = scheme.group_dim == "in_features"
    kind = CodedGrid if along_rows else CodedColumnGrid
    grid = kind(parameters, of_groups, offset=not scheme.symmetric, span=span)
    by_row = grouping.join(codes, scheme.grouped_length(shape))
    columns = grouping.to_rows(by_row, scheme).T.contiguous()
    weight, edges = problem.weight.T.contiguous(), layout.edges_of(scheme, shape)
    polish(grid, edges, weight, columns, factor.hessian, rounds=options.polish_rounds)
    found = layout.to_columns(grid.parameters.transpose(1, 2), scheme)
    return _ordered(found, layout.split_codes(columns, scheme))


def _codec_of(options: BcqOptions) -> Codec:
    """Return the codec of what is written."""
    return coded_format.CODEC if options.scales == "coded" else binary_format.CODEC


def _format_of(options: BcqOptions) -> str:
    """Return the name of what is written."""
    coded = options.scales == "coded"
    return coded_format.CODED_SCALES if coded else binary_format.BINARY_CODING


METHOD = Method(
    summary="Binary coding: an offset plus scaled sign planes, with or without calibration data.",
    options=BcqOptions,
    solve=quantize_bcq,
    layout=lambda scheme, shape, options: _codec_of(options).layout(scheme, shape),
    uses=frozenset({"hessian"}),
    writes=_format_of,
)
