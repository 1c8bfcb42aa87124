"""Kernels of small systems do what torch does."""

import pytest
import torch

from qtool.core import coded_scales, grids, linalg, multiples
from tests.helpers import normal

pytestmark = pytest.mark.gpu


def systems(batch: int, unknowns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return matrices and right sides: the first is all zeros, the second singular."""
    factor = normal(batch, unknowns, unknowns + 2).double()
    factor[:1] = 0
    factor[1:2, -1] = factor[1:2, 0]
    right = normal(batch, unknowns, seed=1).double()
    right[:1] = 0
    right[1:2, -1] = right[1:2, 0]
    return factor @ factor.mT, right


@pytest.mark.parametrize("unknowns", range(1, 10))
@pytest.mark.parametrize("batch", [1, 2, 33, 10_007])
def test_systems_are_solved_as_without_a_card(batch, unknowns):
    matrices, right = systems(batch, unknowns)
    expected = linalg.solve_spd(matrices, right, ridge=linalg.RIDGE)
    found = linalg.solve_spd(matrices.cuda(), right.cuda(), ridge=linalg.RIDGE).cpu()
    assert not bool(found[:1].any())
    residual = (matrices @ (found - expected).unsqueeze(-1)).abs().squeeze(-1)
    assert bool((residual <= 1e-9 * right.abs().amax(1, keepdim=True)).all())


@pytest.mark.parametrize("num_bits", range(1, 9))
@pytest.mark.parametrize("offset", [False, True])
def test_parameters_are_rounded_in_turn_as_without_a_card(num_bits, offset):
    theta = normal(300, 2, num_bits + 1).abs().sort(-1, descending=True).values
    row_scales = coded_scales.fit_row_scales(theta)
    parameters = coded_scales.rounded(theta, row_scales).permute(1, 2, 0).contiguous()
    if not offset:
        parameters[:, -1] = 0
    matrices, right = systems(300, num_bits + int(offset))

    def moved(device: str) -> torch.Tensor:
        of_groups = row_scales.expand(2, -1).contiguous().to(device)
        grid = grids.CodedGrid(parameters.to(device), of_groups, offset=offset)
        return grid.moved(1, matrices.to(device), 0.1 * right.to(device)).cpu()

    found, expected = moved("cuda"), moved("cpu")
    assert not torch.equal(expected, parameters[1])
    assert float((found != expected).float().mean()) < 1e-3  # a tie may fall to the other side


@pytest.mark.parametrize(("batch", "unknowns"), [(3, 10), (9, 96), (64, 128)])
def test_many_parameters_are_rounded_in_turn_as_without_a_card(batch, unknowns):
    matrices, right = systems(batch, unknowns)
    units = normal(unknowns, batch, seed=2).abs() / 8
    units[0] = 0
    old = (normal(unknowns, batch, seed=3).sign() * units).half().float()
    bounds = torch.full((unknowns,), -32.0), torch.full((unknowns,), 31.0)

    def moved(device: str) -> torch.Tensor:
        system = matrices.to(device), 0.1 * right.to(device)
        limits = bounds[0].to(device), bounds[1].to(device)
        return multiples.best_in_turn(*system, old.to(device), units.to(device), limits).cpu()

    found, expected = moved("cuda"), moved("cpu")
    assert not torch.equal(expected, old)
    assert not bool(found[0].any())
    assert float((found != expected).float().mean()) < 1e-2  # a tie moves those after it
