"""dINT: grids that also have plus and minus half a step, so that fewer small weights become zero.

Source: Lee et al. 2023 (arXiv 2311.05161), section on dINT. With calibration data the column step
of GPTQ (`qtool.core.column_solver`) with the nearest level of such a grid; without, the nearest
level. The search of the scale is our design.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from pydantic import Field

from qtool.base import LayerProblem, LayerSolution, Method
from qtool.core import dint, grouping, hessian, metrics
from qtool.core.column_solver import ColumnOptions, ColumnSolver, FitGroups, Order, clip_ratios
from qtool.formats import dint as dint_format
from qtool.recipe.values import Number, WholeNumber
from qtool.scheme import MAX_BITS, Shape2D


@dataclass(frozen=True, slots=True, kw_only=True)
class DintOptions:
    """Options of `dint`."""

    clip_candidates: Annotated[WholeNumber, Field(ge=1, le=1000)] = 30
    """Clip ratios tried for each group, from 1 down to 0.4; 1 tries the whole range only."""
    clip_ratio: Annotated[Number, Field(ge=1e-3, le=1)] | None = None
    """One clip ratio for all groups, in place of those tried; null: each has its best."""
    damping: Annotated[Number, Field(ge=hessian.MIN_DAMPING, le=hessian.MAX_DAMPING)] = 0.01
    """Calibrated: fraction of the mean diagonal added to the Hessian; raised until it factors."""
    order: Order = "activation"
    """Calibrated: columns by descending diagonal, the same group by group, or as they are."""
    polish_rounds: Annotated[WholeNumber, Field(ge=0, le=1000)] = 3
    """Calibrated: rounds of coordinate descent on codes and least squares on scales."""
    column_block: Annotated[WholeNumber, Field(ge=1, le=1 << 20)] = 128
    """Calibrated: columns between two updates of all later ones; changes speed, not the result."""


def quantize_dint(problem: LayerProblem, options: DintOptions) -> LayerSolution:
    """Quantize one weight, under the Hessian of its inputs if there is one."""
    scheme = problem.scheme
    fit = partial(
        dint.search_dint,
        num_bits=scheme.num_bits,
        symmetric=scheme.symmetric,
        clip_ratios=clip_ratios(options.clip_candidates, options.clip_ratio),
    )
    if "hessian" in problem.statistics:
        return _calibrated(problem, options, fit)
    return _data_free(problem, fit)


def _data_free(problem: LayerProblem, fit: FitGroups) -> LayerSolution:
    scheme, shape = problem.scheme, Shape2D(*problem.weight.shape)
    groups = grouping.split(grouping.to_rows(problem.weight, scheme), scheme.group_size)
    scales, zeros = fit(groups, torch.ones(1, device=groups.device))  # padding costs nothing: zero
    codes, _ = dint.nearest_dint(groups, scales, zeros, num_bits=scheme.num_bits)
    tensor = dint_format.encode_dint(codes, scales, zeros, scheme, shape)
    quantized = dint_format.CODEC.dequantize(tensor, torch.float32)
    return LayerSolution(tensor, {"nmse": metrics.nmse(problem.weight, quantized)})


def _calibrated(problem: LayerProblem, options: DintOptions, fit: FitGroups) -> LayerSolution:
    scheme, shape = problem.scheme, Shape2D(*problem.weight.shape)
    columns = ColumnOptions(
        damping=options.damping,
        order=options.order,
        polish_rounds=options.polish_rounds,
        column_block=options.column_block,
    )
    solver = ColumnSolver(fit, dint.DintGrid, columns)
    found = solver.solve(problem.weight, problem.statistics["hessian"], scheme)
    tensor = dint_format.encode_dint(found.codes, found.scales, found.zero_points, scheme, shape)
    quantized = dint_format.CODEC.dequantize(tensor, torch.float32)
    measured = metrics.of_layer(problem.weight, quantized, problem.statistics["hessian"])
    return LayerSolution(tensor, {**measured, "damping": found.damping}, found.fallback)


METHOD = Method(
    summary="Uniform grids with half steps beside zero (dint); with samples under their Hessian.",
    options=DintOptions,
    solve=quantize_dint,
    layout=lambda scheme, shape, _options: dint_format.CODEC.layout(scheme, shape),
    num_bits=range(dint.FEWEST_BITS, MAX_BITS + 1),
    uses=frozenset({"hessian"}),
    writes=lambda _options: dint_format.DINT,
    is_tunable=False,  # a code that moved by one step would leave the levels
)
