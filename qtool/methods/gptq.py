"""GPTQ: uniform grids, column by column, each error absorbed by the columns that are left.

Source: Frantar et al. 2022 (arXiv 2210.17323); what goes beyond it stands in
`qtool.core.column_solver`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from pydantic import Field

from qtool.base import LayerProblem, LayerSolution, Method
from qtool.core import affine, hessian, metrics
from qtool.core.column_solver import ColumnOptions, ColumnSolver, Order, clip_ratios
from qtool.core.grids import AffineGrid
from qtool.formats import affine as affine_format
from qtool.recipe.values import Number, WholeNumber
from qtool.scheme import Shape2D


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
    fit = partial(
        affine.fit_search,
        num_bits=scheme.num_bits,
        symmetric=scheme.symmetric,
        clip_ratios=clip_ratios(options.clip_candidates, options.clip_ratio),
    )
    columns = ColumnOptions(
        damping=options.damping,
        order=options.order,
        polish_rounds=options.polish_rounds,
        column_block=options.column_block,
    )
    solver = ColumnSolver(fit, AffineGrid, columns)
    found = solver.solve(problem.weight, problem.statistics["hessian"], scheme)
    tensor = affine_format.encode_affine(
        found.codes, found.scales, found.zero_points, scheme, shape
    )
    quantized = affine_format.CODEC.dequantize(tensor, torch.float32)
    measured = metrics.of_layer(problem.weight, quantized, problem.statistics["hessian"])
    return LayerSolution(tensor, {**measured, "damping": found.damping}, found.fallback)


METHOD = Method(
    summary="Uniform grids with error feedback under the Hessian of the inputs (affine).",
    options=GptqOptions,
    solve=quantize_gptq,
    layout=lambda scheme, shape, _options: affine_format.CODEC.layout(scheme, shape),
    needs=frozenset({"hessian"}),
)
