import pytest
import torch

from qtool.core.metrics import nmse
from tests.helpers import normal


def test_nmse_of_a_perfect_copy_is_zero():
    assert nmse(normal(3, 4), normal(3, 4)) == 0.0


def test_nmse_of_zeros_for_a_weight_is_one():
    assert nmse(normal(3, 4), torch.zeros(3, 4)) == pytest.approx(1.0)


def test_nmse_of_an_all_zero_weight_does_not_divide_by_zero():
    assert nmse(torch.zeros(2, 2), torch.zeros(2, 2)) == 0.0
    assert nmse(torch.zeros(2, 2), torch.ones(2, 2)) == 4.0


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_nmse_does_not_depend_on_the_scale(factor):
    reference, other = normal(8, 8), normal(8, 8, seed=1)
    assert nmse(reference * factor, other * factor) == pytest.approx(nmse(reference, other))
