"""Fit binary-coding scales without calibration: several starts, alternating refinement.

Source: Guo et al. 2017 (greedy start), Xu et al. 2018 (alternation, arXiv 1802.00150); the offset,
the uniform starts and the choice among starts are measured in docs/log.md.

**Why it is fast.** Levels cut a *sorted* group into runs. With prefix sums of the importance and
of importance * weight, one round of the alternation needs 2^num_bits binary searches per group and
no pass over its weights; the result is exactly that of the plain method.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.core.binary_coding import design
from qtool.core.linalg import solve_spd
from qtool.core.native.fits import fit_groups, fits_natively

CHUNK_ELEMENTS = 2**21
"""Groups are solved in chunks of about this many weights or levels: bounded memory."""
CUDA_CHUNK_ELEMENTS = 2**24
"""The same on a card, which needs more work at a time."""
FIT_RIDGE = 1e-9
"""Relative ridge of the normal equations: duplicate planes make them singular."""
PROGRESS = 1e-9
"""A round that lowers the error by a smaller fraction has converged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """How hard to search."""

    num_bits: int
    offset: bool = True
    """False: levels are symmetric about zero."""
    rounds: int = 30
    clip_ratios: tuple[float, ...] = (1.0, 0.85, 0.7)
    """Fractions of the range covered by the uniform starts."""
    greedy: bool = True
    """Also start from the greedy solution."""


class SortedGroups(NamedTuple):
    """Groups sorted by value, with prefix sums that begin with a zero."""

    values: Tensor  # (groups, group_size) float32, ascending
    mass: Tensor  # (groups, group_size + 1) float64, sums of importance
    moment: Tensor  # (groups, group_size + 1) float64, sums of importance * value
    power: Tensor  # (groups,) float64, sum of importance * value^2

    def take(self, index: Tensor) -> "SortedGroups":
        """Return the groups that `index` names."""
        return SortedGroups(*(part[index] for part in self))

    def repeat(self, times: int) -> "SortedGroups":
        """Return all groups several times over."""
        if times == 1:
            return self
        return SortedGroups(*(torch.cat([part] * times) for part in self))


def sort_groups(groups: Tensor, importance: Tensor) -> SortedGroups:
    """Sort groups (groups, group_size) float32 with their importance >= 0 (0: padding)."""
    values, order = groups.contiguous().sort(-1)
    mass = importance.expand_as(groups).gather(-1, order).double()
    moment = mass * values
    power = (moment * values).sum(-1)
    return SortedGroups(values, _prefix_sums(mass), _prefix_sums(moment), power)


def _prefix_sums(terms: Tensor) -> Tensor:
    return torch.nn.functional.pad(terms.cumsum(-1), (1, 0))


def fit(groups: Tensor, importance: Tensor, options: FitOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Fit scales and offset of each group to its weights.

    Args:
        groups: (groups, group_size) float32.
        importance: Broadcasts to `groups`; non-negative weights of the squared error, zero for
            the padding of a short group.
        options: How hard to search.

    Returns:
        Scales (groups, num_bits) of any sign and order, offsets (groups,) and weighted squared
        errors (groups,), all float64.
    """
    if fits_natively(groups, options.num_bits):
        everywhere = importance.expand_as(groups)
        theta, error = fit_groups(groups, everywhere, options, FIT_RIDGE, PROGRESS)
        return theta[:, :-1], theta[:, -1], error
    limit = CUDA_CHUNK_ELEMENTS if groups.is_cuda else CHUNK_ELEMENTS
    step = max(1, limit // max(groups.shape[-1], 2**options.num_bits))
    importance = importance.expand_as(groups)
    solved = [
        _fit_chunk(groups[i : i + step], importance[i : i + step], options)
        for i in range(0, len(groups), step)
    ]
    theta, error = (torch.cat(parts) for parts in zip(*solved, strict=True))
    return theta[:, :-1], theta[:, -1], error


def _fit_chunk(groups: Tensor, importance: Tensor, options: FitOptions) -> tuple[Tensor, Tensor]:
    """Solve from every start at unit range; return the best theta and error of each group."""
    reach = groups.abs().amax(-1, keepdim=True)
    unit = torch.where(reach > 0, reach, 1.0)  # an all-zero group stays zero
    data = sort_groups(groups / unit, importance)
    starts = list(_starts(groups / unit, importance, options))
    # On a card all starts at once take as long as one: the steps are small. On a CPU they would
    # fall out of the cache.
    together = len(starts) if groups.is_cuda else 1
    theta, error = solve_starts(data, starts, options, together=together)
    scale = unit.double()
    return theta * scale, error.clamp(min=0) * scale.squeeze(-1) ** 2


def solve_starts(
    data: SortedGroups, starts: list[Tensor], options: FitOptions, *, together: int
) -> tuple[Tensor, Tensor]:
    """Alternate from every start, `together` of them at once; keep the best of each group."""
    solved: list[tuple[Tensor, Tensor]] = []
    for i in range(0, len(starts), together):
        some = starts[i : i + together]
        theta, error = alternate(
            data.repeat(len(some)), torch.cat(some), offset=options.offset, rounds=options.rounds
        )
        solved += zip(theta.chunk(len(some)), error.chunk(len(some)), strict=True)
    errors = torch.stack([error for _, error in solved])  # (starts, groups)
    best = errors.argmin(0)  # the first of equals
    every = torch.arange(len(best), device=best.device)
    return torch.stack([theta for theta, _ in solved])[best, every], errors[best, every]


def _starts(groups: Tensor, importance: Tensor, options: FitOptions) -> Iterator[Tensor]:
    """Yield starting points theta (groups, num_bits + 1) float64."""
    real = importance > 0
    low = groups.masked_fill(~real, torch.inf).amin(-1)
    high = groups.masked_fill(~real, -torch.inf).amax(-1)
    low, high = (torch.where(real.any(-1), bound, 0.0).double() for bound in (low, high))
    if not options.offset:
        high = torch.maximum(-low, high)
        low = -high
    for ratio in options.clip_ratios:
        yield uniform_start(low, high, options.num_bits, ratio)
    if options.greedy:
        yield greedy_start(groups, importance, options.num_bits, offset=options.offset)


def uniform_start(low: Tensor, high: Tensor, num_bits: int, clip_ratio: float) -> Tensor:
    """Return the uniform grid over the clipped range: (groups, num_bits + 1) float64."""
    step = clip_ratio * (high - low) / (2**num_bits - 1)
    powers = 2.0 ** torch.arange(num_bits - 2, -2, -1, device=low.device, dtype=low.dtype)
    return torch.cat([step.unsqueeze(-1) * powers, ((low + high) / 2).unsqueeze(-1)], dim=-1)


def greedy_start(groups: Tensor, importance: Tensor, num_bits: int, *, offset: bool) -> Tensor:
    """Return the greedy solution (Guo et al. 2017): (groups, num_bits + 1) float64."""
    total = importance.sum(-1).clamp(min=1e-30)
    mean = (importance * groups).sum(-1) / total if offset else torch.zeros_like(total)
    residual = groups - mean.unsqueeze(-1)
    theta = []
    for _ in range(num_bits):
        scale = (importance * residual.abs()).sum(-1) / total
        theta.append(scale)
        residual = residual - torch.where(residual >= 0, 1.0, -1.0) * scale.unsqueeze(-1)
    return torch.stack([*theta, mean], dim=-1).double()


def alternate(
    data: SortedGroups, theta: Tensor, *, offset: bool, rounds: int
) -> tuple[Tensor, Tensor]:
    """Alternate nearest codes and least squares from a start; keep the best of each group.

    Args:
        data: The sorted groups.
        theta: (groups, num_bits + 1) float64: scales, then the offset.
        offset: False: the offset stays what it is, zero.
        rounds: Upper bound; a group stops as soon as a round doesn't lower its error.

    Returns:
        The best theta met and its error, (groups,) float64; never worse than the start.
    """
    num_bits = theta.shape[1] - 1
    table = design(num_bits, theta.device, theta.dtype)
    unknowns = num_bits + int(offset)
    best, best_error = theta.clone(), torch.full_like(data.power, torch.inf)
    active = torch.arange(len(theta), device=theta.device)
    for _ in range(rounds + 1):
        mass, moment, error = level_sums(data, theta @ table.T)
        better = error < best_error[active] * (1 - PROGRESS)
        best[active[better]], best_error[active[better]] = theta[better], error[better]
        if not bool(better.any()):
            break
        if int(better.sum()) < 0.7 * len(better):  # drop the groups that have converged
            data, active = data.take(better), active[better]
            mass, moment = mass[better], moment[better]
        solved = least_squares(mass, moment, table[:, :unknowns])
        theta = torch.nn.functional.pad(solved, (0, num_bits + 1 - unknowns))
    return best, best_error


def level_sums(data: SortedGroups, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over the weights nearest to each level, (groups, num_levels) float64 by code.

    Returns:
        Importance and importance * weight, (groups, num_levels) each, and the weighted squared
        error (groups,).
    """
    ordered, order = values.sort(-1)
    middles = ((ordered[:, 1:] + ordered[:, :-1]) / 2).float()
    cuts = torch.searchsorted(data.values, middles)  # weights below the middle; ties go up
    cuts = torch.nn.functional.pad(cuts, (1, 1))
    cuts[:, -1] = data.values.shape[-1]
    mass = data.mass.gather(-1, cuts).diff(dim=-1)
    moment = data.moment.gather(-1, cuts).diff(dim=-1)
    error = data.power - 2 * (ordered * moment).sum(-1) + (ordered**2 * mass).sum(-1)
    by_code = torch.empty_like(mass).scatter_(-1, order, mass)
    return by_code, torch.empty_like(moment).scatter_(-1, order, moment), error


def least_squares(mass: Tensor, moment: Tensor, design: Tensor) -> Tensor:
    """Return the unknowns that fit best with the codes fixed, (groups, unknowns).

    `mass` and `moment` are as in `level_sums`; `design`, (num_levels, unknowns), has the signs, and
    a column of ones for the offset.
    """
    unknowns = design.shape[1]
    products = (design.unsqueeze(2) * design.unsqueeze(1)).flatten(1)  # (num_levels, unknowns^2)
    normal = (mass @ products).unflatten(1, (unknowns, unknowns))
    return solve_spd(normal, moment @ design, ridge=FIT_RIDGE)
