"""Binary-coding quantization (BCQ): each group is an offset plus a sum of scaled sign planes.

Without calibration data: several starts, alternating refinement, the best start of each group
(sources in `qtool.core.alternating`). With it (BCQ-H): the same starts, weighted by what the
Hessian says of each column, then codes and levels under error feedback, then a polish of both
under the Hessian (sources in `qtool.core.binary_feedback` and `qtool.core.polish`).
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from qtool.base import LayerProblem, LayerSolution, Method
from qtool.core import alternating, binary_coding, grouping, hessian, layout, metrics
from qtool.core.binary_feedback import solve_columns, solve_groups
from qtool.core.grids import BinaryGrid
from qtool.core.hessian import Factor
from qtool.core.polish import polish
from qtool.errors import RecipeError
from qtool.formats import binary_coding as binary_format
from qtool.recipe.schema import Number, WholeNumber
from qtool.scheme import Shape2D

COLUMN_BLOCK = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class BcqOptions:
    """Options of `bcq`."""

    rounds: Annotated[WholeNumber, Field(ge=0, le=1000)] = 30
    """Upper bound on the alternations of codes and scales; a group stops when it has converged."""
    clip_ratios: Annotated[
        tuple[Annotated[Number, Field(ge=1e-3, le=1)], ...], Field(max_length=100)
    ] = (1.0, 0.85, 0.7)
    """Uniform starts: fractions of the group's range that they cover."""
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
    scheme = problem.scheme
    theta = _fit(problem, _real(problem), options)
    # Round the parameters first: codes must be nearest for the levels that are stored.
    theta = theta.to(torch.float16)
    groups = grouping.split(grouping.to_rows(problem.weight, scheme), scheme.group_size)
    flat = theta.flatten(0, 1)
    codes = binary_coding.assign(groups.flatten(0, 1), flat[:, :-1], flat[:, -1])
    return _solution(problem, theta, codes.view(groups.shape), {}, fallback)


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
        grid = BinaryGrid(start, offset=not scheme.symmetric, span=span)
        work = columns[order]
        codes = solve_columns(work, factor.upper, grid, order, column_block=COLUMN_BLOCK)
        codes = codes[order.argsort()].contiguous()
    polish(grid, edges, columns, codes, factor.hessian, rounds=options.polish_rounds)
    theta = layout.to_columns(grid.parameters.transpose(1, 2), scheme)
    notes = {"damping": factor.damping}
    return _solution(problem, theta, layout.split_codes(codes, scheme), notes, None)


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
    notes: dict[str, float],
    fallback: str | None,
) -> LayerSolution:
    """Bring the planes to their stored order and pack; theta is (rows, num_groups, unknowns)."""
    scheme, shape = problem.scheme, Shape2D(*problem.weight.shape)
    flat = theta.to(torch.float16).flatten(0, 1)
    scales, ordered = binary_coding.canonical(flat[:, :-1], codes.flatten(0, 1))
    tensor = binary_format.encode_binary(
        ordered.view(codes.shape),
        scales.unflatten(0, codes.shape[:2]),
        flat[:, -1].view(codes.shape[:2]),
        scheme,
        shape,
    )
    quantized = binary_format.CODEC.dequantize(tensor, torch.float32)
    statistics = problem.statistics.get("hessian")
    measured = metrics.of_layer(problem.weight, quantized, statistics)
    return LayerSolution(tensor, {**measured, **notes}, fallback)


METHOD = Method(
    summary="Binary coding: an offset plus scaled sign planes, with or without calibration data.",
    options=BcqOptions,
    solve=quantize_bcq,
    layout=binary_format.CODEC.layout,
    uses=frozenset({"hessian"}),
)
