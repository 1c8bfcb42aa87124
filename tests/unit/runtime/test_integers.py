"""Integer products of backend cuda; `torch._int_mm` runs on a CPU as well."""

import pytest
import torch

from qtool.runtime.backends.cuda.integers import row_integers
from qtool.scheme import Shape2D, WeightScheme
from qtool.steps.plan import load_method
from tests.helpers import dequantized, normal, problem

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def rounded(shape, **scheme):
    method = load_method("rtn")
    given = problem(normal(*shape) + 0.3, WeightScheme(**{"group_size": None, **scheme}))
    return method.solve(given, method.options()).tensor


def on(device, tensor):
    parts = {name: part.to(device) for name, part in tensor.parts.items()}
    return type(tensor)(tensor.format, tensor.scheme, tensor.shape, parts)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 4, 7, 8])
@pytest.mark.parametrize("shape", [(3, 5), (16, 64), (40, 130)])
@pytest.mark.parametrize("tokens", [1, 16, 17, 100])
def test_a_product_of_integers_is_exact(device, shape, num_bits, symmetric, tokens):
    tensor = rounded(shape, num_bits=num_bits, symmetric=symmetric)
    weight = row_integers(on(device, tensor))
    assert weight is not None
    assert (weight.shifts is None) or num_bits == 8
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-127, 128, (tokens, shape[1]), dtype=torch.int8, generator=generator)
    got = weight.multiply(codes.to(device)).cpu()
    exact = codes.double() @ dequantized(tensor, torch.float64).T
    assert got.shape == (tokens, shape[0])
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def test_weights_of_more_than_one_group_or_of_other_formats_have_none():
    assert row_integers(rounded((8, 64), num_bits=4, group_size=32)) is None
    assert row_integers(rounded((8, 64), num_bits=4, group_dim="out_features")) is None
    method = load_method("bcq")
    given = problem(normal(*Shape2D(8, 64)), WeightScheme(num_bits=2, group_size=None))
    assert row_integers(method.solve(given, method.options(rounds=1)).tensor) is None
