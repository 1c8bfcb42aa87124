"""Groups solved and fitted on a processor, against float64 and against what torch does alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.core import alternating, binary_feedback
from qtool.core.binary_coding import design, levels
from qtool.core.native import building
from qtool.core.native import groups as native
from qtool.core.native.fits import fits_natively
from tests.helpers import normal

needs_compiler = pytest.mark.skipif(building.compiler() is None, reason="there is no C compiler")
bits_of_codes = st.integers(1, 6)


def problem(columns, rows, bits, count=2):
    """Return weights, the factor of a random inverse Hessian, and starts."""
    seen = normal(3 * columns + 2, columns, seed=1)
    hessian = seen.T @ seen / len(seen) + 0.05 * torch.eye(columns)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True).float()
    scales = 2.0 ** -torch.arange(1.0, bits + 1)[None, :, None] * (1 + normal(count, 1, rows) / 9)
    starts = torch.cat([scales, torch.zeros(count, 1, rows)], dim=1)
    return normal(columns, rows, seed=2), upper, starts


def errors_in_float64(weight, upper, codes, parameters):
    table = levels(parameters[:-1].T.double(), parameters[-1].double())
    quantized = table.T.gather(0, codes.long())
    change = weight.double() - quantized
    return torch.linalg.solve_triangular(upper.T.double(), change, upper=False)


@needs_compiler
@settings(max_examples=8, deadline=None)
@given(
    columns=st.integers(1, 40), rows=st.integers(1, 150), bits=bits_of_codes, offset=st.booleans()
)
def test_group_is_solved_as_well_as_by_torch(columns, rows, bits, offset):
    weight, upper, starts = problem(columns, rows, bits)
    given_weight = weight.clone()
    options = {"offset": offset, "iterations": 3}
    codes, parameters, errors = native.group_natively(weight, upper, starts, **options)
    assert torch.equal(weight, given_weight)
    assert offset or not bool(parameters[-1].any())
    expected = errors_in_float64(weight, upper, codes, parameters)
    torch.testing.assert_close(errors.double(), expected, rtol=1e-3, atol=1e-4)
    by_torch = binary_feedback.group_by_torch(weight, upper, starts, **options)[2]
    # A code that rounds otherwise leads elsewhere: single rows may differ, all together hardly.
    loss, other = errors.square().sum(), by_torch.square().sum()
    assert float(loss) <= 1.02 * float(other) + 1e-6 * errors.numel()


@needs_compiler
@pytest.mark.parametrize("offset", [True, False])
def test_rows_of_a_usual_group_are_those_of_torch(offset):
    weight, upper, starts = problem(64, 300, 3)
    found = native.group_natively(weight, upper, starts, offset=offset, iterations=4)
    expected = binary_feedback.group_by_torch(weight, upper, starts, offset=offset, iterations=4)
    same = (found[0] == expected[0]).all(0)
    assert float(same.double().mean()) > 0.97
    torch.testing.assert_close(found[1][:, same], expected[1][:, same], rtol=1e-3, atol=1e-5)


@needs_compiler
@settings(max_examples=8, deadline=None)
@given(
    columns=st.integers(1, 40), rows=st.integers(1, 150), bits=bits_of_codes, offset=st.booleans()
)
def test_normal_equations_are_those_of_float64(columns, rows, bits, offset):
    codes = torch.randint(2**bits, (columns, rows), dtype=torch.uint8)
    seen, gradient = normal(columns + 3, columns, seed=3), normal(columns, rows, seed=4)
    matrix = seen.T @ seen
    found, right = native.equations_natively(codes, matrix, gradient, bits, offset=offset)
    basis = design(bits, codes.device, torch.float64)[codes.long()][..., : bits + int(offset)]
    size = float(matrix.abs().sum())
    expected = torch.einsum("crm,cd,drn->rmn", basis, matrix.double(), basis)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * size)
    expected = torch.einsum("crm,cr->rm", basis, gradient.double())
    torch.testing.assert_close(right, expected, rtol=0, atol=1e-5 * columns)


@needs_compiler
def test_threads_do_not_change_a_group():
    weight, upper, starts = problem(33, 500, 3)
    before, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(native.group_natively(weight, upper, starts, offset=True, iterations=2))
    torch.set_num_threads(before)
    assert all(torch.equal(*pair) for each in found for pair in zip(each, found[0], strict=True))


def test_what_is_too_large_is_for_torch():
    like = torch.zeros(1, 5)
    assert not native.takes_group(native.MOST_COLUMNS + 1, 3, like)
    assert not native.takes_group(128, native.MOST_SOLVED_PLANES + 1, like)
    assert not native.takes_group(128, 3, like.double())
    assert not fits_natively(torch.zeros(4, 5000), 3)
    assert not fits_natively(torch.zeros(4, 128), 7)


@needs_compiler
@settings(max_examples=8, deadline=None)
@given(size=st.integers(1, 150), bits=bits_of_codes, offset=st.booleans(), greedy=st.booleans())
def test_groups_are_fitted_as_by_torch(size, bits, offset, greedy):
    groups, importance = normal(60, size, seed=5), normal(60, size, seed=6).abs() + 0.01
    importance[:, size // 2 + 1 :: 5] = 0  # padding
    groups[3] = 0
    options = alternating.FitOptions(
        num_bits=bits, offset=offset, rounds=6, clip_ratios=(1.0, 0.8), greedy=greedy
    )
    assert fits_natively(groups, bits)
    found = alternating.fit(groups, importance, options)[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alternating, "fits_natively", lambda *_: False)
        expected = alternating.fit(groups, importance, options)[2]
    power = (importance.double() * groups.double() ** 2).sum(1)
    close = (found - expected).abs() <= 1e-6 * expected + 1e-9 * power
    assert float(close.double().mean()) > 0.9
    assert float(found.sum()) <= 1.01 * float(expected.sum()) + 1e-9 * float(power.sum())
