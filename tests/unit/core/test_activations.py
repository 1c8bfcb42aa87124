"""Activations as integers: steps, codes, thresholds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.core.activations import (
    fake_quantize,
    multiply_quantized,
    quantize_activations,
    step_sizes,
)
from qtool.errors import SchemeError
from qtool.scheme import ActivationScheme

bits = st.integers(2, 8)


@given(bits=bits, seed=st.integers(0, 2**16), scale=st.floats(1e-3, 1e3))
def test_what_codes_stand_for_is_within_half_a_step(bits, seed, scale):
    x = scale * torch.randn(5, 33, generator=torch.Generator().manual_seed(seed))
    scheme = ActivationScheme(num_bits=bits)
    codes, steps = quantize_activations(x, scheme)
    assert codes.dtype == torch.int8
    assert int(codes.abs().max()) == scheme.largest_code  # each token uses its whole range
    assert (codes.abs().amax(-1) == scheme.largest_code).all()
    error = (codes.double() * steps.double() - x.double()).abs()
    assert (error <= (0.5 + 1e-4) * steps.double()).all()
    assert torch.equal(fake_quantize(x, scheme), codes.float() * steps)


@given(seed=st.integers(0, 2**16), shift=st.sampled_from([-0.25, -0.1, 0.0, 0.1, 0.25]))
def test_negatives_have_the_negative_codes(seed, shift):
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))
    scheme = ActivationScheme(rounding=shift)
    assert torch.equal(quantize_activations(-x, scheme)[0], -quantize_activations(x, scheme)[0])


def test_a_shifted_threshold_moves_towards_zero_or_away():
    x = torch.tensor([[127.0, 0.4, 0.6, -0.4, -0.6, 3.7]])
    codes = [quantize_activations(x, ActivationScheme(rounding=r))[0] for r in (-0.2, 0.0, 0.2)]
    assert codes[0].tolist() == [[127, 1, 1, -1, -1, 4]]
    assert codes[1].tolist() == [[127, 0, 1, 0, -1, 4]]
    assert codes[2].tolist() == [[127, 0, 0, 0, 0, 4]]


def test_per_tensor_beyond_the_range_is_clipped():
    scheme = ActivationScheme(granularity="tensor", scale=0.5)
    x = torch.tensor([[1000.0, -1000.0, 0.5]])
    assert fake_quantize(x, scheme).tolist() == [[63.5, -63.5, 0.5]]


def test_a_token_of_zeros_stays_zero():
    x = torch.zeros(2, 8)
    assert torch.equal(fake_quantize(x, ActivationScheme()), x)
    assert bool(torch.isfinite(step_sizes(x, ActivationScheme())).all())


@pytest.mark.parametrize(
    "fields",
    [
        {"num_bits": 1},
        {"num_bits": 9},
        {"granularity": "channel"},
        {"clip_ratio": 0.0},
        {"clip_ratio": 1.5},
        {"rounding": 0.3},
        {"granularity": "tensor"},
        {"scale": 1.0},
        {"granularity": "tensor", "scale": 0.0},
        {"granularity": "tensor", "scale": float("nan")},
    ],
)
def test_impossible_schemes_are_refused(fields):
    with pytest.raises(SchemeError):
        ActivationScheme(**fields)


@given(bits=bits, seed=st.integers(0, 2**16))
def test_a_product_is_that_of_codes_and_steps(bits, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 33, dtype=torch.float64, generator=generator)
    weight = torch.randn(7, 33, dtype=torch.float64, generator=generator)
    scheme = ActivationScheme(num_bits=bits)
    codes, steps = quantize_activations(x, scheme)
    exact = (codes.double() @ weight.T) * steps.double()
    got = multiply_quantized(x, scheme, lambda values: values @ weight.T)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_gets_codes_exactly_and_stays_in_range(dtype):
    scheme = ActivationScheme()
    x = torch.full((1, 4096), 3.0, dtype=dtype)
    x[0, :255] = torch.linspace(-3, 3, 255).to(dtype)
    weight = torch.full((1, 4096), 0.25, dtype=dtype)  # codes times it: 122,000, beyond float16
    seen = []

    def product(values):
        seen.append(values)
        return (values.float() @ weight.float().T).to(dtype)

    got = multiply_quantized(x, scheme, product)
    codes, steps = quantize_activations(x, scheme)
    assert torch.equal(seen[0].double() * 128, codes.double())
    exact = (codes.double() @ weight.double().T) * steps.double()
    torch.testing.assert_close(got.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "scheme", [ActivationScheme(), ActivationScheme(num_bits=6, clip_ratio=0.9, rounding=0.05)]
)
def test_a_card_finds_the_same_steps_and_codes(dtype, scheme):
    x = torch.randn(513, 2432, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, steps = quantize_activations(x.cuda(), scheme)
    expected_codes, expected_steps = quantize_activations(x, scheme)
    assert torch.equal(steps.cpu(), expected_steps)
    assert torch.equal(codes.cpu(), expected_codes)
