"""bcq with scales of few bits: what it writes, and that it is nearly as good as with float16."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from qtool.core import coded_scales
from qtool.core.column_grids import CodedColumnGrid
from qtool.core.grids import CodedGrid, Span
from qtool.core.hessian import relative_loss
from qtool.core.polish import Descent, all_values, residual
from qtool.formats import coded_scales as coded_format
from qtool.methods.bcq import METHOD, BcqOptions
from qtool.scheme import GROUP_DIMS, Shape2D, WeightScheme
from tests.helpers import dequantized, normal, problem, statistics

QUICK = BcqOptions(rounds=5, iterations=2, start_powers=(0.0,), polish_rounds=1)
CODED = replace(QUICK, scales="coded")


def loss(tensor, given):
    hessian = given.statistics.get("hessian", torch.eye(given.weight.shape[1]))
    return relative_loss(dequantized(tensor) - given.weight, given.weight, hessian)


@pytest.mark.parametrize("needs", [(), ("hessian",)], ids=["data-free", "calibrated"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_dim", GROUP_DIMS)
@pytest.mark.parametrize("num_bits", range(1, 9))
def test_every_scheme_is_solved_nearly_as_well(needs, symmetric, group_dim, num_bits):
    """Rows of 56 have a short last group."""
    scheme = WeightScheme(
        num_bits=num_bits, group_size=24, group_dim=group_dim, symmetric=symmetric
    )
    given = problem(normal(40, 56), scheme, needs)
    tensor = METHOD.solve(given, CODED).tensor
    assert (tensor.format, tensor.scheme, tensor.shape) == ("coded_scales", scheme, (40, 56))
    promised = METHOD.layout(scheme, tensor.shape, CODED)
    assert promised == coded_format.CODEC.layout(scheme, tensor.shape)
    assert {part: tuple(t.shape) for part, t in tensor.parts.items()} == {
        part: spec.shape for part, spec in promised.items()
    }
    scales = coded_format.to_binary(tensor).parts["plane_scales"]
    assert bool((scales.diff(dim=0) <= 0).all())
    # With 8 or 9 parameters for 24 weights, these are fitted to their last bit.
    most = 1.3 if num_bits <= 6 else 2
    assert loss(tensor, given) < most * loss(METHOD.solve(given, QUICK).tensor, given)


def test_polishing_on_what_can_be_stored_pays():
    given = problem(normal(64, 192), WeightScheme(num_bits=3, group_size=64), ["hessian"])
    rounded, polished = (
        METHOD.solve(given, BcqOptions(scales="coded", start_powers=(0.0,), polish_rounds=rounds))
        for rounds in (0, 3)
    )
    assert loss(polished.tensor, given) < 0.99 * loss(rounded.tensor, given)


@pytest.mark.parametrize("weight", [torch.zeros(4, 40), torch.full((4, 40), -0.25)])
@pytest.mark.parametrize("needs", [(), ("hessian",)], ids=["data-free", "calibrated"])
def test_constant_weights_stay_constant(weight, needs):
    given = problem(weight, WeightScheme(num_bits=3, group_size=16), needs)
    found = dequantized(METHOD.solve(given, CODED).tensor)
    assert bool(((found - weight).abs() <= weight.abs() / 32).all())


def along_rows(theta, row_scales):
    """Return a grid of groups along in_features, and the boundaries of its groups."""
    parameters = theta.permute(2, 0, 1).contiguous()
    return CodedGrid(parameters, row_scales.expand(3, -1), offset=True), [0, 16, 32, 48]


def along_columns(theta, row_scales):
    """Return the same of groups along out_features."""
    parameters, of_groups = theta.permute(2, 0, 1).contiguous(), row_scales[:, None].expand(-1, 2)
    grid = CodedColumnGrid(parameters, of_groups, offset=True, span=Span(16, 32))
    return grid, [*range(49)]


@pytest.mark.parametrize(
    ("group_dim", "made"), [("in_features", along_rows), ("out_features", along_columns)]
)
def test_refits_never_raise_the_loss_and_stay_multiples(group_dim, made):
    weight, hessian = normal(32, 48), statistics(["hessian"], 48)["hessian"]
    scheme = WeightScheme(num_bits=3, group_size=16, group_dim=group_dim)
    given = problem(weight, scheme)
    tensor = METHOD.solve(given, BcqOptions(scales="coded", polish_rounds=0)).tensor
    row_scales = tensor.parts["row_scales"]
    parts = coded_format.to_binary(tensor).parts
    theta = torch.cat([parts["plane_scales"], parts["plane_offsets"][None]]).float()
    grid, edges = made(theta, row_scales)
    columns = weight.T.contiguous()
    codes = torch.randint(
        0, 8, columns.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    levels = all_values(grid, edges, codes)
    descent = Descent(grid, edges, codes, levels, residual(columns, levels, hessian), hessian)
    losses = [relative_loss((levels - columns).T, weight, hessian)]
    for step in (descent.refit, descent.descend_codes) * 2:
        step()
        assert torch.equal(levels, all_values(grid, edges, codes))
        losses.append(relative_loss((levels - columns).T, weight, hessian))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]
    by_row = grid.parameters.permute(2, 0, 1) if made is along_rows else grid.parameters.mT
    assert torch.equal(coded_scales.rounded(by_row, row_scales), by_row)


def test_shape_of_one_weight():
    given = problem(normal(1, 1), WeightScheme(num_bits=1, group_size=None))
    assert METHOD.solve(given, CODED).tensor.shape == Shape2D(1, 1)


@pytest.mark.parametrize("needs", [(), ("hessian",)], ids=["data-free", "calibrated"])
def test_scales_that_float16_cannot_hold_are_seen(needs):
    """A run refuses a layer whose stored parts aren't finite."""
    given = problem(1e6 * normal(8, 32), WeightScheme(num_bits=3, group_size=16), needs)
    parts = METHOD.solve(given, CODED).tensor.parts
    assert not bool(torch.isfinite(parts["row_scales"]).any())
