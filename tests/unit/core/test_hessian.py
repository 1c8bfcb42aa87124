import pytest
import torch

from qtool.core import hessian
from tests.helpers import normal, statistics

WIDTH = 24


def matrix(seed: int = 7) -> torch.Tensor:
    return statistics(["hessian"], WIDTH, seed)["hessian"]


def test_accumulated_batches_are_the_product_of_all_inputs():
    x = normal(50, WIDTH)
    total = torch.zeros(WIDTH, WIDTH)
    for batch in x.split(7):
        hessian.accumulate(total, batch, batch)
    torch.testing.assert_close(total, x.T @ x, rtol=1e-5, atol=1e-4)


def test_factor_gives_the_inverse_in_the_order_asked_for():
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(0))
    factor = hessian.factorize(matrix(), damping=0.01, order=order)
    assert factor is not None
    inverse = torch.linalg.inv(factor.hessian.double())[order][:, order]
    upper = factor.upper.double()
    torch.testing.assert_close(upper.T @ upper, inverse, rtol=1e-4, atol=1e-5)
    assert not bool(upper.tril(-1).any())


def test_damping_is_a_fraction_of_the_mean_diagonal():
    damped = hessian.damp(matrix(), 0.5)
    diagonal = matrix().diagonal()
    expected = torch.diag(0.5 * diagonal.mean().expand(WIDTH))
    torch.testing.assert_close(damped - matrix(), expected, rtol=1e-4, atol=1e-5)


def test_largest_damping_is_tried_wherever_the_first_one_was():
    needs_all = torch.eye(8)
    needs_all[0, 1] = needs_all[1, 0] = 1.9  # positive only above a damping of 0.9
    for damping in (0.01, 0.3, 0.95, 1.0):
        factor = hessian.factorize(needs_all, damping=damping)
        assert factor is not None, damping
        assert factor.damping == pytest.approx(max(damping, 1.0 if damping < 0.95 else damping))


def test_damping_rises_until_the_hessian_factors():
    indefinite = matrix()
    indefinite -= 1.05 * torch.linalg.eigvalsh(indefinite)[0] * torch.eye(WIDTH)
    factor = hessian.factorize(indefinite, damping=1e-6)
    assert factor is not None
    assert factor.damping > 1e-6


@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
def test_hessian_that_is_not_finite_never_factors(spoil):
    broken = matrix()
    broken[3, 3] = spoil
    assert hessian.factorize(broken, damping=0.01) is None


@pytest.mark.parametrize("ratio", [1.0, 3.0])
def test_capped_tokens_keep_their_direction(ratio):
    x = normal(31, WIDTH)
    x[0] *= 1000
    capped = x * hessian.token_weights(x, ratio)
    limit = ratio * x.norm(dim=-1).median()
    assert float(capped.norm(dim=-1).max()) <= float(limit) * 1.001
    cosine = torch.nn.functional.cosine_similarity(x, capped, dim=-1)
    torch.testing.assert_close(cosine, torch.ones(31))
    small = x.norm(dim=-1) <= limit
    assert torch.equal(capped[small], x[small])
