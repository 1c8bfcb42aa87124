"""Integer products of backend cuda; `torch._int_mm` runs on a CPU as well."""

from dataclasses import replace

import pytest
import torch

from qtool.checkpoint.manifest import LayerEntry
from qtool.core.activations import quantize_activations
from qtool.runtime import modules
from qtool.runtime.backends.cuda.integers import integer_bytes, row_integers
from qtool.runtime.backends.dense import DenseBackend
from qtool.runtime.modules import QuantizedLinear
from qtool.scheme import ActivationScheme, Shape2D, WeightScheme
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
    held = [each for each in (weight.integers, weight.scales, weight.shifts) if each is not None]
    assert integer_bytes(tensor) == sum(each.nbytes for each in held)
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


class Integers(DenseBackend):
    """Multiplies integers on a CPU too."""

    def integer_product(self, tensor, dtype):
        del dtype
        return row_integers(tensor)


@pytest.fixture
def linear(monkeypatch):
    """Return a linear with quantized inputs that multiplies integers from 64 tokens on."""
    monkeypatch.setattr(modules, "choose_backend", lambda *_: Integers())
    tensor = rounded((24, 40), num_bits=8)
    entry = LayerEntry(
        format=tensor.format,
        scheme=tensor.scheme,
        shape=tensor.shape,
        method="rtn",
        activation=ActivationScheme(),
    )
    made = QuantizedLinear(entry, normal(24))
    assert made.bias is not None
    made.bias.data = normal(24)
    for part, values in tensor.parts.items():
        made.get_buffer(part).copy_(values)
    return made


def defined(linear, x):
    codes, steps = quantize_activations(x, linear.entry.activation)
    weight = dequantized(linear.tensor(), torch.float64)
    return (codes.double() @ weight.T) * steps + linear.bias.double()


@torch.no_grad()
@pytest.mark.parametrize("shape", [(3, 40), (2, 5, 40), (64, 40), (2, 50, 40), (40,)])
def test_a_linear_gives_the_same_by_integers_and_by_floats(linear, shape):
    x = normal(*shape)
    y = linear(x)
    assert y.shape == (*shape[:-1], 24)
    torch.testing.assert_close(y.double(), defined(linear, x), rtol=1e-4, atol=1e-4)
    assert linear.product_of(63) == "floats"
    assert linear.product_of(64) == "integers"


@torch.no_grad()
@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("tokens", [5, 100])
def test_a_compiled_linear_gives_the_same(linear, warm, tokens):
    torch._dynamo.reset()
    x = normal(tokens, 40)
    if warm:
        linear(x)
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x).double(), defined(linear, x), rtol=1e-4, atol=1e-4)


def test_linears_whose_inputs_stay_have_no_integers(linear):
    linear.entry = replace(linear.entry, activation=None)
    linear(normal(100, 40))
    assert linear.product_of(100) == "floats"
