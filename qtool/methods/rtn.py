"""Round to nearest (RTN): the calibration-free baseline that all else is measured against.

Each weight goes to the nearest point of the uniform grid over its group's range.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from qtool.base import LayerProblem, LayerSolution, Method
from qtool.core import affine, grouping, metrics
from qtool.formats import affine as affine_format
from qtool.recipe.values import Number
from qtool.scheme import MAX_SHIFT, Shape2D


@dataclass(frozen=True, slots=True, kw_only=True)
class RtnOptions:
    """Options of `rtn`."""

    clip_ratio: Annotated[Number, Field(ge=1e-3, le=1)] = 1.0
    """Fraction of the group's range that the grid covers, above 0; below 1 clips outliers."""
    rounding: Annotated[Number, Field(ge=-MAX_SHIFT, le=MAX_SHIFT)] = 0.0
    """Shift of the threshold between two levels, in steps: above 0 more goes towards zero."""


def quantize_rtn(problem: LayerProblem, options: RtnOptions) -> LayerSolution:
    """Quantize one weight; ignores all statistics."""
    scheme = problem.scheme
    shape = Shape2D(*problem.weight.shape)
    groups = grouping.split(grouping.to_rows(problem.weight, scheme), scheme.group_size)
    scales, zero_points = affine.fit_min_max(
        groups,
        num_bits=scheme.num_bits,
        symmetric=scheme.symmetric,
        clip_ratio=options.clip_ratio,
    )
    codes = affine.nearest_codes(
        groups, scales, zero_points, num_bits=scheme.num_bits, rounding=options.rounding
    )
    tensor = affine_format.encode_affine(codes, scales, zero_points, scheme, shape)
    error = metrics.nmse(problem.weight, affine_format.CODEC.dequantize(tensor, torch.float32))
    return LayerSolution(tensor, {"nmse": error})


METHOD = Method(
    summary="Round to nearest on a uniform grid (affine).",
    options=RtnOptions,
    solve=quantize_rtn,
    layout=lambda scheme, shape, _options: affine_format.CODEC.layout(scheme, shape),
)
