"""dINT: the arithmetic of its codes, exhaustively, and what rounding to its levels must keep."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.core import affine, dint
from qtool.core.grids import Span
from tests.helpers import normal

WIDTHS = range(dint.FEWEST_BITS, 9)
EVERY_WIDTH = pytest.mark.parametrize("num_bits", WIDTHS)
widths = st.integers(dint.FEWEST_BITS, 8)
values = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40)


def all_codes(num_bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every code with every number that zero points of these bits can be."""
    count = 2**num_bits
    codes = torch.arange(count, dtype=torch.uint8)
    return codes[None].expand(count, count), codes[:, None]


@EVERY_WIDTH
def test_doubled_values_are_those_of_the_definition(num_bits):
    codes, zeros = all_codes(num_bits)
    got = dint.doubled_values(codes, zeros, num_bits)
    levels = 2**num_bits - 2  # of whole steps
    for zero in range(2**num_bits):
        whole = [2 * (code - zero) for code in range(levels)]
        assert got[zero].tolist() == [*whole, 1, -1]


@EVERY_WIDTH
def test_every_code_has_a_value_of_its_own(num_bits):
    codes, zeros = all_codes(num_bits)
    for row in dint.doubled_values(codes, zeros, num_bits):
        assert len(set(row.tolist())) == 2**num_bits


@EVERY_WIDTH
@pytest.mark.parametrize("symmetric", [False, True])
def test_int8_holds_doubled_values_up_to_the_widest(num_bits, symmetric):
    codes, zeros = all_codes(num_bits)  # those that no writer writes as well
    if symmetric:
        zeros = torch.full((1, 1), dint.middle_code(num_bits), dtype=torch.uint8)
    doubled = dint.doubled_values(codes, zeros, num_bits)
    fits = int(doubled.min()) >= -128 and int(doubled.max()) <= 127
    assert fits == (num_bits <= dint.WIDEST_IN_INT8[symmetric])


@EVERY_WIDTH
def test_products_with_half_of_any_scale_are_exact_in_float32(num_bits):
    scales = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16)  # all that are finite
    for doubled in dint.doubled_values(*all_codes(num_bits), num_bits).unique().tolist():
        got = doubled * (scales.float() / 2)
        assert torch.equal(got.double(), doubled * scales.double() / 2)


@given(num_bits=widths, symmetric=st.booleans(), zero=st.integers(0, 253), steps=values)
def test_nearest_codes_are_those_of_the_nearest_levels(num_bits, symmetric, zero, steps):
    top = dint.top_code(num_bits)
    zero = dint.middle_code(num_bits) if symmetric else min(zero, top)
    given_steps = torch.tensor(steps).remainder(4 * top) - 2 * top
    codes, chosen = dint.nearest_in_steps(given_steps, torch.tensor(float(zero)), top)
    every = torch.arange(2**num_bits, dtype=torch.uint8)
    levels = dint.doubled_values(every, torch.tensor(zero), num_bits).double() / 2
    assert torch.equal(levels[codes.long()], chosen.double())
    distances = (given_steps.double()[:, None] - levels).abs()
    assert torch.equal((given_steps.double() - chosen.double()).abs(), distances.amin(1))


@EVERY_WIDTH
def test_thresholds_inside_a_grid_are_those_of_the_middles(num_bits):
    zero, top = dint.middle_code(num_bits), dint.top_code(num_bits)
    steps = torch.linspace(-zero, top - zero, 8 * top + 1)  # with all middles, which are ties
    _, chosen = dint.nearest_in_steps(steps, torch.tensor(float(zero)), top)
    size = steps.abs()
    expected = torch.where(size < 0.25, 0.0, torch.where(size < 0.75, 0.5, size.round()))
    assert torch.equal(chosen, steps.sign() * expected)


@given(num_bits=widths, symmetric=st.booleans(), ratio=st.floats(0.1, 1), weights=values)
def test_rounding_keeps_zero_order_and_what_is_rounded(num_bits, symmetric, ratio, weights):
    groups = torch.tensor([*sorted(weights), 0.0])[None, None]
    fitted = dint.fit_dint(groups, num_bits=num_bits, symmetric=symmetric, clip_ratio=ratio)
    _, levels = dint.nearest_dint(groups, *fitted, num_bits=num_bits)
    assert levels[0, 0, -1] == 0
    assert bool((levels[0, 0, :-1].diff() >= 0).all())
    again = dint.nearest_dint(levels, *fitted, num_bits=num_bits)
    assert torch.equal(again[1], levels)


@given(num_bits=widths, symmetric=st.booleans(), weights=values)
def test_errors_are_within_half_a_step_and_a_quarter_near_zero(num_bits, symmetric, weights):
    groups = torch.tensor(weights)[None, None]
    scales, zeros = dint.fit_dint(groups, num_bits=num_bits, symmetric=symmetric, clip_ratio=1)
    _, levels = dint.nearest_dint(groups, scales, zeros, num_bits=num_bits)
    steps = (groups.double() / scales.double().unsqueeze(-1)).abs()
    # A range in whole steps may end between two of them, and float16 rounds the scale.
    slack = 0.5 if not symmetric else 0
    bound = torch.where(steps <= 0.75, 0.25, 0.5 + slack) + steps * 2.0**-10 + 1e-6
    assert bool(
        ((levels.double() - groups.double()).abs() / scales.double()[..., None] <= bound).all()
    )


@given(
    num_bits=widths,
    symmetric=st.booleans(),
    seed=st.integers(0, 100),
    tried=st.lists(st.floats(0.3, 1), min_size=1, max_size=5),
)
def test_the_search_finds_the_best_ratio_of_each_group(num_bits, symmetric, seed, tried):
    groups, importance = normal(3, 2, 24, seed=seed) ** 3, normal(24, seed=seed + 1).abs()
    grid = {"num_bits": num_bits, "symmetric": symmetric}

    def errors(scales, zeros):
        _, levels = dint.nearest_dint(groups, scales, zeros, num_bits=num_bits)
        return (importance * (levels - groups).square()).sum(-1)

    each = torch.stack([errors(*dint.fit_dint(groups, clip_ratio=r, **grid)) for r in tried])
    found = errors(*dint.search_dint(groups, importance, clip_ratios=tried, **grid))
    assert torch.equal(found, each.amin(0))


@given(num_bits=widths, symmetric=st.booleans(), seed=st.integers(0, 100))
def test_a_grid_picks_what_rounding_does(num_bits, symmetric, seed):
    rows, size = 5, 12
    groups = normal(rows, 2, size, seed=seed)
    scales, zeros = dint.fit_dint(groups, num_bits=num_bits, symmetric=symmetric, clip_ratio=0.9)
    codes, levels = dint.nearest_dint(groups, scales, zeros, num_bits=num_bits)
    grid = dint.DintGrid(scales.T.float(), zeros.T.float(), num_bits, Span(1, rows))
    for group in range(2):
        tables = grid.tables([group] * size)
        for column in range(size):
            got = grid.pick(tables, column, groups[:, group, column])
            assert torch.equal(got[0], codes[:, group, column])
            assert torch.equal(got[1], levels[:, group, column])
        assert torch.equal(grid.values(group, codes[:, group].T), levels[:, group].T)


DRAWS = {
    "gauss": lambda generator, n: torch.randn(n, generator=generator),
    "laplace": lambda generator, n: torch.distributions.Laplace(0, 1).icdf(
        torch.rand(n, generator=generator).clamp(1e-7, 1 - 1e-7)
    ),
}


@pytest.mark.parametrize(
    ("kind", "size", "int4", "dint4"),
    [
        ("gauss", 64, 0.00829, 0.00866),
        ("gauss", 4096, 0.0196, 0.0176),
        ("laplace", 128, 0.0170, 0.0135),
    ],
)
def test_errors_are_those_that_were_worked_out(kind, size, int4, dint4):
    """It pays where groups are long or tails heavy, and not in short groups of normal weights."""
    groups = DRAWS[kind](torch.Generator().manual_seed(0), 2**20).view(1, -1, size)
    scales, zeros = affine.fit_min_max(groups, num_bits=4, symmetric=False, clip_ratio=1)
    codes = affine.nearest_codes(groups, scales, zeros, num_bits=4)
    uniform = affine.affine_values(codes, scales[..., None], zeros[..., None], torch.float32)
    fitted = dint.fit_dint(groups, num_bits=4, symmetric=False, clip_ratio=1)
    _, levels = dint.nearest_dint(groups, *fitted, num_bits=4)
    for got, expected in ((uniform, int4), (levels, dint4)):
        error = float((got - groups).square().sum() / groups.square().sum())
        assert error == pytest.approx(expected, rel=0.03)
