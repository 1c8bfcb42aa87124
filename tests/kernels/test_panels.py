"""Groups along out_features: panels of rows that share their scales, launched on the CPU."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.core.layout import side_by_side
from qtool.runtime.backends.cuda import (
    fusing,
    grids,
    linear_kernels,
    panel_linear,
    panels,
    room,
)
from qtool.runtime.backends.cuda.launch import Card
from qtool.runtime.decode import torch_ops
from qtool.runtime.decode.ops import Norm
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import dequantized, normal
from tests.kernels.host import Recorder

SHARED = 227 * 1024
SMALL = Card(multiprocessors=2, shared_bytes=144 * 1024)


def weight_of(shape, num_bits=3, group_size=128, format_name="binary_coding", seed=0, **more):
    scheme = WeightScheme(
        num_bits=num_bits, group_size=group_size, group_dim="out_features", **more
    )
    return random_tensor(format_name, scheme, Shape2D(*shape), seed)


@pytest.fixture
def share_tiles(monkeypatch):
    """Let CTAs share tiles wherever they could have whole ones; returns what does."""

    def patch():
        monkeypatch.setattr(grids, "MOST_IDLE", -1)
        forget()

    def forget():
        panel_linear.plan_panels.cache_clear()
        panel_linear.panel_call.cache_clear()

    yield patch
    forget()


def check(tensor, x, card, launch, allowed=2.0):
    """Compare a product with float64; `allowed`: of the roundings of all terms."""
    weight = linear_kernels.prepare(tensor, x.dtype)
    assert weight.tiles is None and weight.stored is None
    got = linear_kernels.matmul(x, weight, launch, card)
    exact = dequantized(tensor, torch.float64)
    y = x.double() @ exact.T
    terms = x.double().abs() @ exact.abs().T
    bound = torch.finfo(x.dtype).eps * y.abs() + allowed * 2.0**-11 * terms + 1e-30
    assert bool(((got.double() - y).abs() <= bound).all())


@settings(max_examples=25)
@given(
    format_name=st.sampled_from(["binary_coding", "affine"]),
    num_bits=st.sampled_from([1, 2, 3, 4, 8]),
    shape=st.tuples(st.integers(1, 400), st.integers(1, 530)),
    group_size=st.sampled_from([8, 16, 24, 100, 128, 300, None]),
    symmetric=st.booleans(),
    seed=st.integers(0, 9),
)
def test_packing_loses_nothing(format_name, num_bits, shape, group_size, symmetric, seed):
    tensor = weight_of(shape, num_bits, group_size, format_name, seed, symmetric=symmetric)
    weight = linear_kernels.prepare(tensor, torch.float16)
    exact = dequantized(tensor)
    torch.testing.assert_close(weight.dense().float(), exact, rtol=2e-3, atol=2e-3)
    packed = weight.panels
    assert packed is not None
    held = sum(part.numel() * part.element_size() for part in (packed.planes, packed.scales))
    assert room.card_bytes(tensor) == held, "what `doctor` and `bench` foretell"
    lost = held - 512 * num_bits * -(-shape[0] // 16) * -(-shape[1] // 256)
    assert lost >= packed.scales.nbytes


# Rows x inputs, bits, rows of a group, multiprocessors: shares that begin and end within panels,
# panels of several blocks, blocks of several panels, more warps than tiles; of whole tiles, runs of
# one panel, of two, and with whole panels between them.
PRODUCTS = [
    ((256, 512), 3, 128, 3),
    ((300, 700), 2, 100, 7),
    ((1200, 301), 4, None, 2),
    ((40, 300), 3, 16, 1),
    ((130, 520), 8, 24, 5),
    ((2100, 256), 1, 64, 12),
]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_one_and_two_tokens_are_exact_but_for_the_cast(case, whole, share_tiles):
    if not whole:
        share_tiles()
    shape, num_bits, group_size, multiprocessors = case
    tensor, card = weight_of(shape, num_bits, group_size), Card(multiprocessors, SHARED)
    tokens, dtype = (1, torch.float16) if whole == case[1] % 2 else (2, torch.bfloat16)
    x = normal(tokens, shape[1])
    x[:, ::37] *= 300
    launch = Recorder()
    check(tensor, x.to(dtype), card, launch, allowed=2e-3)
    assert launch.names == ["bit_panel_imma"]
    assert dict(launch.calls[0].constants)["WHOLE"] == whole


TOKENS = (3, 8, 9, 16, 5, 23)


@pytest.mark.parametrize(("tokens", "case"), [*zip(TOKENS, PRODUCTS, strict=True)], ids=str)
def test_more_tokens_are_multiplied_by_weights_rounded_per_plane(
    monkeypatch, case, tokens, share_tiles
):
    # two blocks of tokens, though such a weight is small
    monkeypatch.setenv("QTOOL_KERNEL", "planes")
    if tokens in (5, 8, 9):
        share_tiles()
    shape, num_bits, group_size, multiprocessors = case
    tensor, card = weight_of(shape, num_bits, group_size), Card(multiprocessors, SHARED)
    dtype, launch = torch.float16 if tokens % 2 else torch.bfloat16, Recorder()
    x = (30 * normal(tokens, shape[1])).to(dtype)
    check(tensor, x, card, launch, allowed=num_bits)
    assert launch.names == ["bit_panel_mma"]


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("format_name", ["affine", "dint"])
def test_centers_are_offsets_of_columns(format_name, tokens):
    tensor = weight_of((50, 300), 3, 32, format_name)
    check(tensor, normal(tokens, 300).half(), SMALL, Recorder(), allowed=4.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_what_is_not_finite_shows(value, tokens):
    tensor, x = weight_of((48, 300)), normal(tokens, 300).half()
    x[-1, 7] = value
    weight = linear_kernels.prepare(tensor, x.dtype)
    y = linear_kernels.matmul(x, weight, Recorder(), SMALL)
    assert not bool(y[-1].isfinite().any())
    assert bool(y[:-1].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [((300, 700), 2, 100), ((130, 301), 5, 24), ((64, 256), 3, None)])
def test_a_dequantized_weight_and_its_rows_are_the_rounded_definition(case, dtype):
    shape, num_bits, group_size = case
    tensor = weight_of(shape, num_bits, group_size)
    weight, launch = linear_kernels.prepare(tensor, dtype), Recorder()
    expected = dequantized(tensor).to(dtype)
    assert torch.equal(linear_kernels.dense_weight(weight, launch), expected)
    index = torch.tensor([[0, shape[0] - 1], [shape[0] // 2, 3]])
    assert torch.equal(linear_kernels.rows(index, weight, launch), expected[index])
    assert launch.names == ["panel_dequantize", "panel_rows"]
    beyond = torch.tensor([shape[0], -1])
    assert bool(linear_kernels.rows(beyond, weight, launch).isnan().all())


@pytest.mark.parametrize("group_size", [16, 100])
@pytest.mark.parametrize("tokens", [1, 2, 7, 100])
def test_gate_and_up_meet_where_their_panels_alternate(tokens, group_size):
    pair = [weight_of((120, 700), 2, group_size, seed=seed) for seed in (1, 2)]
    x = (normal(tokens, 700) / 700**0.5).half()
    fused = fusing.fuse(pair, x.dtype, interleave=True)
    assert fused is not None
    launch = Recorder()
    got = linear_kernels.matmul(x, fused.prepared, launch, Card(3, SHARED), gated=True)
    sides = [x.double() @ dequantized(tensor, torch.float64).T for tensor in pair]
    expected = torch.nn.functional.silu(sides[0]) * sides[1]
    torch.testing.assert_close(got.double(), expected, rtol=4e-3, atol=4e-3)
    assert len(launch.names) == 1
    dense = side_by_side(fused.prepared.dense().T).T
    torch.testing.assert_close(dense, torch.cat([part.dense() for part in fused.parts]))
    for tensor, part in zip(pair, fused.parts, strict=True):
        alone = linear_kernels.prepare(tensor, x.dtype)
        assert torch.equal(part.dense(), alone.dense())


def test_queries_keys_and_values_of_whole_groups_are_one_weight():
    rows, x = (256, 128, 40), normal(2, 300).half()
    tensors = [weight_of((count, 300), seed=count) for count in rows]
    fused = fusing.fuse(tensors, x.dtype)
    assert fused is not None
    y = linear_kernels.matmul(x, fused.prepared, Recorder(), SMALL)
    parts = [linear_kernels.matmul(x, part, Recorder(), SMALL) for part in fused.parts]
    torch.testing.assert_close(y, torch.cat(parts, dim=1))
    exact = torch.cat([dequantized(tensor) for tensor in tensors])
    torch.testing.assert_close(fused.prepared.dense().float(), exact, rtol=2e-3, atol=2e-3)
    assert fusing.fuse(tensors[::-1], x.dtype) is None, "a group would begin within another's"
    along_inputs = replace(tensors[0].scheme, group_dim="in_features")
    other = random_tensor("binary_coding", along_inputs, Shape2D(128, 300), 0)
    assert fusing.fuse([tensors[0], other], x.dtype) is None


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_residual_is_added_before_the_cast(tokens):
    tensor, x = weight_of((130, 300)), (normal(tokens, 300) / 18).half()
    residual = normal(tokens, 130, seed=2).half()
    weight = linear_kernels.prepare(tensor, x.dtype)
    got = linear_kernels.matmul(x, weight, Recorder(), SMALL, residual=residual)
    expected = x.double() @ dequantized(tensor, torch.float64).T + residual.double()
    torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.float16), (2, torch.bfloat16)])
def test_a_norm_in_the_product_is_the_norm_before_it(tokens, dtype, gated):
    pair = [weight_of((64, 700), 2, 32, seed=seed) for seed in (1, 2)]
    fused, launch = fusing.fuse(pair, dtype, interleave=gated), Recorder()
    assert fused is not None
    weight, norm = fused.prepared, Norm(normal(700, seed=3).to(dtype), 1e-5)
    x = (9 * normal(tokens, 700)).to(dtype)
    assert linear_kernels.can_norm(weight, tokens, SMALL, gated=gated)
    got = linear_kernels.matmul(x, weight, launch, SMALL, norm=norm, gated=gated)
    assert launch.names == ["bit_panel_imma"]
    normed = torch_ops.OPS.rms_norm(x, *norm)
    apart = linear_kernels.matmul(normed, weight, Recorder(), SMALL, gated=gated)
    # sums of squares in another order: an input in thousands is rounded to its neighbour
    assert bool((got - apart).norm() <= torch.finfo(dtype).eps * apart.norm())
    assert not linear_kernels.can_norm(weight, 3, SMALL, gated=gated)


def test_groups_of_fewer_rows_go_by_the_definition():
    tensor, x, launch = weight_of((40, 300), group_size=7), normal(1, 300).half(), Recorder()
    weight = linear_kernels.prepare(tensor, x.dtype)
    assert weight.panels is None
    linear_kernels.matmul(x, weight, launch, SMALL)
    assert launch.names == ["sign_flip"]


@pytest.mark.parametrize("kilobytes", [99, 163, 227])
@pytest.mark.parametrize("num_bits", [1, 3, 4, 8])
@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("tokens", [1, 2, 8, 16])
def test_every_card_has_room_for_panels(kilobytes, num_bits, sets, tokens):
    card, layout = Card(132, kilobytes * 1024), panels.PanelLayout(num_bits, 8, 1, sets)
    for count, units in ((1002, 16), (32, 56), (448, 32), (5, 3)):
        planned = panel_linear.plan_panels(count, units, tokens, layout, card=card)
        assert planned is not None
        assert planned.shared_bytes <= kilobytes * 1024
        if kilobytes == 227 and sets == 1:  # else they may follow one another
            assert planned.ctas <= 132 and planned.warps >= 8


@pytest.mark.parametrize(
    ("case", "columns", "warps"), [((224, 16), 16, 8), ((32, 56), 16, 8), ((32, 16), 8, 8)]
)
def test_small_weights_are_multiplied_by_more_and_smaller_blocks(case, columns, warps):
    card, layout = Card(132, SHARED), panels.PanelLayout(3, 8, 1)
    planned = panel_linear.plan_panels(*case, 16, layout, card=card)
    assert planned is not None
    assert (planned.product.columns, planned.warps) == (columns, warps)
    one = panel_linear.plan_panels(*case, 1, layout, card=card)
    assert one is not None
    assert (one.warps, one.stages, one.whole) == (16, 3, True)


@pytest.mark.parametrize(
    ("case", "ctas", "chunk", "whole"),
    [
        ((224, 16, 8), 128, 8, True),  # 14 of 1792 tiles each
        ((32, 16, 8), 128, 2, True),
        ((32, 56, 8), 128, 2, True),
        ((9, 3, 4), 36, 1, True),
        ((448, 32, 8), 132, 8, False),  # 28 tiles each would leave 27 of 869 steps idle
    ],
)
def test_blocks_have_whole_tiles_where_these_come_out_even(case, ctas, chunk, whole):
    count, units, tiles = case
    card, layout = Card(132, SHARED), panels.PanelLayout(3, tiles, 1)
    planned = panel_linear.plan_panels(count, units, 1, layout, card=card)
    assert planned is not None
    assert (planned.ctas, planned.chunk, planned.whole) == (ctas, chunk, whole)
