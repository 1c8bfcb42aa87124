"""Binary-coding quantization (BCQ): each group is an offset plus a sum of scaled sign planes.

Without calibration data: several starts, alternating refinement, the best start of each group.
Sources in `qtool.core.alternating`.
"""

from dataclasses import dataclass

import torch

from qtool.base import LayerProblem, LayerSolution, Method
from qtool.core import alternating, binary_coding, grouping, metrics
from qtool.errors import RecipeError
from qtool.formats import binary_coding as binary_format
from qtool.scheme import Shape2D


@dataclass(frozen=True, slots=True, kw_only=True)
class BcqOptions:
    """Options of `bcq`."""

    rounds: int = 30
    """Upper bound on the alternations of codes and scales; a group stops when it has converged."""
    clip_ratios: tuple[float, ...] = (1.0, 0.85, 0.7)
    """Uniform starts: fractions of the group's range that they cover."""
    greedy: bool = True
    """Also start from the greedy solution."""

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise RecipeError(f"rounds is {self.rounds}; allowed are 0 and more.")
        if not self.clip_ratios and not self.greedy:
            raise RecipeError("No start is left: give clip_ratios, or set greedy to true.")
        if any(not 0 < ratio <= 1 for ratio in self.clip_ratios):
            raise RecipeError(f"clip_ratios is {self.clip_ratios}; each must be in (0, 1].")


def quantize_bcq(problem: LayerProblem, options: BcqOptions) -> LayerSolution:
    """Quantize one weight; ignores all statistics."""
    scheme = problem.scheme
    shape = Shape2D(*problem.weight.shape)
    rows = grouping.split(grouping.to_rows(problem.weight, scheme), scheme.group_size)
    groups = rows.flatten(0, 1)  # (rows * num_groups, group_size)
    length = scheme.grouped_length(shape)
    real = grouping.valid(length, scheme.group_size, groups.device).float()
    scales, offsets, _ = alternating.fit(
        groups,
        real.repeat(len(rows), 1),
        alternating.FitOptions(
            num_bits=scheme.num_bits,
            offset=not scheme.symmetric,
            rounds=options.rounds,
            clip_ratios=options.clip_ratios,
            greedy=options.greedy,
        ),
    )
    # Round the parameters first: codes must be nearest for the levels that are stored.
    scales, offsets = scales.to(torch.float16), offsets.to(torch.float16)
    codes = binary_coding.assign(groups, scales, offsets)
    scales, codes = binary_coding.canonical(scales, codes)
    tensor = binary_format.encode(
        codes.unflatten(0, rows.shape[:2]),
        scales.unflatten(0, rows.shape[:2]),
        offsets.unflatten(0, rows.shape[:2]),
        scheme,
        shape,
    )
    error = metrics.nmse(problem.weight, binary_format.dequantize(tensor, torch.float32))
    return LayerSolution(tensor, {"nmse": error})


METHOD = Method(
    summary="Binary coding: an offset plus scaled sign planes, refined from several starts.",
    options=BcqOptions,
    solve=quantize_bcq,
    layout=binary_format.layout,
)
