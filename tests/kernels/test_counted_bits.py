"""One token of planes whose bits are counted: which weights, and on which cards."""

import re

import pytest
import torch

from qtool.runtime.backends.cuda import fusing, linear_kernels, planes
from qtool.runtime.backends.cuda.launch import Card
from qtool.runtime.backends.cuda.sources import kernel_source
from qtool.runtime.decode.ops import Norm
from qtool.runtime.decode.torch_ops import rms_norm
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import dequantized, normal
from tests.kernels.host import Recorder
from tests.kernels.nvrtc import ptx_of

COUNTING = Card(3, 227 * 1024, counts_bits=True)
SMALL = Card(2, 40 * 1024, counts_bits=True)
EPS = 1e-5


def weight_of(num_bits: int, shape: tuple[int, int], group_size: int | None = 128, seed: int = 1):
    scheme = WeightScheme(num_bits=num_bits, group_size=group_size)
    return random_tensor("binary_coding", scheme, Shape2D(*shape), seed)


@pytest.mark.parametrize(
    ("batch", "num_bits", "group", "offset", "name"),
    [
        *((1, bits, 128, 1, "bit_plane_bmma") for bits in (1, 2, 3, 4)),
        (1, 3, 384, 0, "bit_plane_bmma"),
        (1, 3, 64, 1, "bit_plane_imma"),  # half of what one product takes
        (1, 5, 128, 1, "bit_plane_imma"),
        (1, 4, 128, planes.CENTERED, "bit_plane_imma"),  # four planes are one number
        (2, 3, 128, 1, "bit_plane_imma"),
    ],
)
def test_bits_of_one_token_are_counted_where_cards_do(batch, num_bits, group, offset, name):
    layout = planes.Layout(num_bits, group, offset)
    assert planes.product_for(batch, layout, COUNTING).name == name
    plain = planes.product_for(batch, layout, COUNTING._replace(counts_bits=False)).name
    assert plain == "bit_plane_imma"


@pytest.mark.parametrize("card", [COUNTING, SMALL], ids=["alone", "slabs"])
@pytest.mark.parametrize(
    ("num_bits", "group_size", "dtype"), [(3, 128, torch.float16), (4, None, torch.bfloat16)]
)
def test_a_residual_is_added_to_what_is_counted(num_bits, group_size, dtype, card):
    tensor, launch = weight_of(num_bits, (40, 9216), group_size), Recorder()
    x, residual = (normal(1, n, seed=n).to(dtype) for n in (9216, 40))
    weight = linear_kernels.prepare(tensor, dtype)
    got = linear_kernels.matmul(x, weight, launch, card, residual=residual)
    assert launch.names == ["bit_plane_bmma", *(["add_splits"] if card is SMALL else [])]
    exact = dequantized(tensor, torch.float64)
    expected = x.double() @ exact.T + residual.double()
    terms = x.double().abs() @ exact.abs().T
    error = (got.double() - expected).abs()
    assert bool((error <= torch.finfo(dtype).eps * expected.abs() + 1e-6 * terms).all())


def test_gate_and_up_of_a_normed_token_are_counted():
    pair = [weight_of(3, (24, 1100), seed=seed) for seed in (1, 2)]
    fused = fusing.fuse(pair, torch.float16, interleave=True)
    assert fused is not None
    x, gains, launch = normal(1, 1100).half(), normal(1, 1100, seed=5)[0].half(), Recorder()
    norm = Norm(gains, EPS)
    assert linear_kernels.can_norm(fused.prepared, 1, COUNTING, gated=True)
    got = linear_kernels.matmul(x, fused.prepared, launch, COUNTING, gated=True, norm=norm)
    assert launch.names == ["bit_plane_bmma"] and dict(launch.calls[0].constants)["NORM"] > 0
    normed = rms_norm(x, gains, EPS).double()
    gate, up = (normed @ dequantized(tensor, torch.float64).T for tensor in pair)
    expected = torch.nn.functional.silu(gate) * up
    assert float((got.double() - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize(("tokens", "inputs"), [(1, 16896), (2, 8704)])
@pytest.mark.parametrize("fmt", ["binary_coding", "affine"])
def test_two_ctas_stage_a_half_each_of_what_one_would_stage_for_long(fmt, tokens, inputs):
    card = Card(4, 227 * 1024, warpgroups=True, counts_bits=True)
    tensor = random_tensor(fmt, WeightScheme(num_bits=2, group_size=128), Shape2D(40, inputs), 1)
    weight, x, launch = (
        linear_kernels.prepare(tensor, torch.float16),
        normal(tokens, inputs).half(),
        Recorder(),
    )
    assert linear_kernels.can_norm(weight, tokens, card) is False, "nobody has all inputs"
    got = linear_kernels.matmul(x, weight, launch, card)
    assert [dict(call.constants)["CLUSTER"] for call in launch.calls] == [2]
    counted = fmt == "binary_coding" and tokens == 1
    assert launch.names == ["bit_plane_bmma" if counted else "bit_plane_imma"]
    expected = x.double() @ dequantized(tensor, torch.float64).T
    assert float((got.double() - expected).norm() / expected.norm()) < 5e-4
    plain = linear_kernels.matmul(x, weight, Recorder(), card._replace(warpgroups=False))
    assert float((got.double() - plain.double()).norm() / expected.norm()) < 5e-4


@pytest.mark.parametrize("num_bits", [1, 4])
def test_counts_are_numbers_where_the_compiler_takes_subnormals_for_zeros(num_bits):
    grid = {"WARPS": 16, "STAGES": 2, "BLOCKS": 1, "EPILOGUE": 0, "ALIGNED": 1, "COLUMNS": 1}
    layout = planes.Layout(num_bits, 128, 1).macros
    source = kernel_source("bit_plane_bmma", {**grid, **planes.PLAIN_LAUNCH, **layout})
    text = ptx_of("compute_90", source)
    assert "fma.rn.ftz.f32" in text, "that is how it was told to compile"
    # Halves of a unit, rows, columns; what else is there is of the compiler's choice.
    assert len(re.findall(r"\bfma\.rn\.f32\b", text)) >= 2 * 2 * 6 * num_bits
