"""Parameters that must be whole multiples of a unit: the best of them, one after another."""

import torch
from torch import Tensor

from qtool.core.kernel_modules import usable_kernels
from qtool.core.linalg import TINY

PASSES = 2
"""Over all parameters: one at a time they aren't best at once."""


def best_in_turn(
    normal: Tensor, right: Tensor, old: Tensor, units: Tensor, bounds: tuple[Tensor, Tensor]
) -> Tensor:
    """Move each parameter in turn to the multiple at which a quadratic loss is least.

    Args:
        normal: (batch, unknowns, unknowns) float64, of the step from the old parameters.
        right: (batch, unknowns) float64.
        old: (parameters, batch) float32, the unknowns first; the others stay.
        units: (unknowns, batch) float32; where one is zero, so is the parameter.
        bounds: Lowest and highest multiples, (parameters,) float32 each.

    Returns:
        (parameters, batch) float32: multiples, rounded to float16.
    """
    kernels = usable_kernels("small_kernels", "try_systems", right.device)
    if kernels is not None:
        found: Tensor = kernels.round_in_turn(
            normal, right, old, units, bounds, passes=PASSES, tiny=TINY
        )
        return found
    new, slopes = old.clone(), right.clone()
    curvatures = normal.diagonal(dim1=1, dim2=2) + TINY
    divisors = torch.where(units > 0, units, torch.inf)
    for unknown in [*range(right.shape[1])] * PASSES:
        before = new[unknown]
        wanted = before + (slopes[:, unknown] / curvatures[:, unknown]).float()
        lowest, highest = (bound[unknown] for bound in bounds)
        multiple = (wanted / divisors[unknown]).round().clamp(lowest, highest)
        value = (multiple * units[unknown]).to(torch.float16).float()
        slopes.addcmul_(normal[:, unknown], (value - before).double().unsqueeze(1), value=-1)
        new[unknown] = value
    return new
