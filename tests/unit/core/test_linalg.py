import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.core.linalg import products_of_rows, solve_spd, sums_of_rows


def gram(batch: int, n: int, rank: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(batch, rank, n, generator=generator, dtype=torch.float64)
    return factor.mT @ factor


@given(batch=st.integers(1, 20), n=st.integers(1, 9), seed=st.integers(0, 10_000))
def test_equals_torch_on_well_conditioned_systems(batch, n, seed):
    matrices = gram(batch, n, 3 * n + 3, seed)
    right = gram(batch, n, 2, seed + 1)[:, 0]
    expected = torch.linalg.solve(matrices, right)
    torch.testing.assert_close(solve_spd(matrices, right, ridge=0.0), expected, rtol=1e-8, atol=0)


@given(n=st.integers(1, 9), rank=st.integers(0, 8), seed=st.integers(0, 10_000))
def test_singular_systems_give_a_finite_near_solution(n, rank, seed):
    matrices = gram(4, n, min(rank, n - 1), seed)
    truth = gram(4, n, 2, seed + 1)[:, 0]
    right = (matrices @ truth.unsqueeze(-1)).squeeze(-1)  # consistent: a solution exists
    solved = solve_spd(matrices, right, ridge=1e-9)
    assert bool(torch.isfinite(solved).all())
    residual = (matrices @ solved.unsqueeze(-1)).squeeze(-1) - right
    assert float(residual.abs().max()) <= 1e-4 * (1 + float(right.abs().max()))


def test_inputs_are_left_as_they_are():
    matrices, right = gram(3, 4, 9, 0), gram(3, 4, 9, 1)[:, 0]
    before = matrices.clone(), right.clone()
    solve_spd(matrices, right, ridge=1e-3)
    assert torch.equal(matrices, before[0])
    assert torch.equal(right, before[1])


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e30])
def test_scale_of_the_system_does_not_matter(scale):
    matrices, right = gram(3, 5, 11, 0), gram(3, 5, 11, 1)[:, 0]
    expected = solve_spd(matrices, right, ridge=1e-9)
    scaled = solve_spd(matrices * scale, right * scale, ridge=1e-9)
    torch.testing.assert_close(scaled, expected, rtol=1e-9, atol=0)


@given(
    columns=st.integers(1, 130),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    rows=st.integers(1, 40),
)
def test_products_of_rows_are_those_of_each_row(columns, sizes, rows):
    generator = torch.Generator().manual_seed(columns)
    left, right = (torch.randn(columns, size, rows, generator=generator) for size in sizes)
    expected = torch.stack([left[..., row].T @ right[..., row] for row in range(rows)])
    torch.testing.assert_close(products_of_rows(left, right), expected, rtol=1e-4, atol=1e-4)
    sums = sums_of_rows(left, right[:, 0])
    torch.testing.assert_close(sums, expected[..., 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unknowns", [2, 4, 5])
@pytest.mark.parametrize("columns", [32, 64, 128])
def test_products_of_rows_are_those_of_einsum(columns, unknowns):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, columns, unknowns, 96, generator=generator)
    expected = torch.einsum("cmr,cnr->rmn", left.double(), right.double()).float()
    torch.testing.assert_close(products_of_rows(left, right), expected, rtol=1e-5, atol=2e-5)
    sums = sums_of_rows(left, right[:, 0].contiguous())
    torch.testing.assert_close(sums, expected[..., 0], rtol=1e-5, atol=2e-5)


def test_products_of_a_row_do_not_depend_on_the_others():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 128, 4, 96, generator=generator)
    whole = products_of_rows(left, right)
    halves = [
        products_of_rows(left[..., rows], right[..., rows]) for rows in (slice(32), slice(32, None))
    ]
    torch.testing.assert_close(torch.cat(halves), whole, rtol=1e-6, atol=1e-5)
