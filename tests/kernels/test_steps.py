"""Weights of formats `minima` and `nested` as planes: all kernels, launched on the CPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.runtime.backends.cuda import centers, decode_ops, fusing, linear_kernels
from qtool.runtime.backends.cuda.launch import Card
from qtool.scheme import GROUP_DIMS, Shape2D, WeightScheme
from tests.helpers import dequantized, normal, rounding_of_steps, stepped
from tests.kernels.host import Recorder

SMALL = Card(multiprocessors=2, shared_bytes=144 * 1024)
FORMATS = pytest.mark.parametrize("format_name", ["minima", "nested"])


def check(got, x, tensor):
    """Compare with x @ W.T, within the rounding of parameters and result."""
    exact = dequantized(tensor, torch.float64)
    terms = 2 * torch.finfo(x.dtype).eps * (x.double().abs() @ exact.abs().T)
    allowed = terms + x.double().abs() @ rounding_of_steps(tensor).T
    error = (got.double() - x.double() @ exact.T).abs()
    assert bool((error <= allowed + 1e-30).all())


@given(
    format_name=st.sampled_from(["minima", "nested"]),
    num_bits=st.integers(1, 8),
    group_size=st.sampled_from([16, 32, 40, None]),
    group_dim=st.sampled_from(GROUP_DIMS),
    symmetric=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_parameters_are_rounded_by_no_more_than_is_stated(
    format_name, num_bits, group_size, group_dim, symmetric, seed
):
    scheme = WeightScheme(
        num_bits=num_bits, group_size=group_size, group_dim=group_dim, symmetric=symmetric
    )
    tensor = stepped(format_name, scheme, Shape2D(17, 90), seed)
    made = centers.planes_of(tensor)
    assert made.scheme == centers.scheme_of_planes(tensor)
    assert all(part.dtype in (torch.float16, torch.int32) for part in made.parts.values())
    exact = dequantized(tensor, torch.float64)
    error = (centers.weight_of(made).double() - exact).abs()
    float32 = 2.0**-21 * rounding_of_steps(tensor) * 2**11  # sums of parameters
    assert bool((error <= rounding_of_steps(tensor) + float32 + 2.0**-40).all())


@FORMATS
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("num_bits", "group_size"), [(5, 32), (8, None)])
@pytest.mark.parametrize("batch", [1, 5, 17])
def test_products_are_those_of_the_definition(format_name, symmetric, num_bits, group_size, batch):
    scheme = WeightScheme(num_bits=num_bits, group_size=group_size, symmetric=symmetric)
    tensor, x = stepped(format_name, scheme, Shape2D(24, 300), batch), normal(batch, 300).half()
    weight, launch = linear_kernels.prepare(tensor, x.dtype), Recorder()
    check(linear_kernels.matmul(x, weight, launch, SMALL), x, tensor)
    imma = batch == 1 and group_size != 32
    many = "dequantize" if batch == 17 else "bit_plane_mma"
    found = "bit_plane_codes_mma" if symmetric else many
    assert launch.names[0] == ("bit_plane_imma" if imma else found)


@FORMATS
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kernel", ["lut", "sign_flip"])
def test_kernels_that_read_stored_parts_are_right_too(format_name, symmetric, kernel):
    scheme = WeightScheme(num_bits=4, group_size=32, symmetric=symmetric)
    tensor, x = stepped(format_name, scheme, Shape2D(24, 320), 3), normal(3, 320).half()
    weight = linear_kernels.prepare(tensor, x.dtype, keep_stored=True)
    check(linear_kernels.matmul(x, weight, Recorder(), SMALL, kernel=kernel), x, tensor)


@FORMATS
@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_and_what_torch_makes_of_tiles_are_the_weight(format_name, symmetric):
    scheme = WeightScheme(num_bits=5, group_size=32, symmetric=symmetric)
    tensor = stepped(format_name, scheme, Shape2D(50, 100), 4)
    weight, index = linear_kernels.prepare(tensor, torch.float16), torch.tensor([0, 49, 7])
    exact = dequantized(tensor, torch.float64)
    allowed = 2**-10 * exact.abs() + 1.01 * rounding_of_steps(tensor) + 2.0**-24
    for got in (weight.dense(), linear_kernels.dense_weight(weight, Recorder())):
        assert bool(((got.double() - exact).abs() <= allowed).all())
    got = linear_kernels.rows(index, weight, Recorder())
    assert bool(((got.double() - exact[index]).abs() <= allowed[index]).all())


@FORMATS
@pytest.mark.parametrize("symmetric", [False, True])
def test_gate_and_up_are_one_weight_of_the_decoder(format_name, symmetric):
    scheme = WeightScheme(num_bits=4, group_size=32, symmetric=symmetric)
    pair = [stepped(format_name, scheme, Shape2D(24, 320), seed) for seed in (1, 2)]
    x, ops = (normal(2, 320) / 18).half(), decode_ops.KernelOps(Recorder(), SMALL)
    fused = fusing.fuse(pair, x.dtype, interleave=True)
    assert fused is not None
    gate, up = (x.double() @ dequantized(tensor, torch.float64).T for tensor in pair)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(
        ops.gated(x, fused.prepared).double(), expected, rtol=4e-3, atol=4e-3
    )
    for tensor, part in zip(pair, fused.parts, strict=True):
        alone = linear_kernels.prepare(tensor, x.dtype)
        torch.testing.assert_close(part.dense(), alone.dense(), rtol=0, atol=0)


@FORMATS
def test_groups_that_tiles_do_not_have_are_left_to_another_backend(format_name):
    def reason(group_size, group_dim="in_features"):
        scheme = WeightScheme(num_bits=3, group_size=group_size, group_dim=group_dim)
        return centers.why_no_planes(stepped(format_name, scheme, Shape2D(20, 96), 0))

    assert reason(32) is reason(64) is reason(None) is reason(100) is None
    for found in (reason(16), reason(40), reason(32, "out_features")):
        assert found is not None and found.endswith(".") and format_name in found
    assert "these are of 16 in_features" in str(reason(16))
