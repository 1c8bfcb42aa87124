"""The choice of kernels, grids and arguments, launched on the CPU."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import BackendError
from qtool.runtime.backends.cuda import (
    fusing,
    grids,
    linear_kernels,
    plane_plans,
    plane_products,
    planes,
    selection,
)
from qtool.runtime.backends.cuda.launch import Card
from qtool.scheme import GROUP_DIMS, Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import dequantized, normal
from tests.kernels.host import Recorder

SMALL = Card(multiprocessors=2, shared_bytes=144 * 1024)
WIDE = Card(multiprocessors=132, shared_bytes=227 * 1024)


def multiply(tensor, x, card=SMALL):
    launch = Recorder()
    weight = linear_kernels.prepare(tensor, x.dtype)
    return linear_kernels.matmul(x, weight, launch, card), launch


def check(tensor, x, card=SMALL):
    got, launch = multiply(tensor, x, card)
    exact = dequantized(tensor, torch.float64)
    terms = x.double().abs() @ exact.abs().T
    error = (got.double() - x.double() @ exact.T).abs()
    assert bool((error <= 2 * torch.finfo(x.dtype).eps * terms + 1e-30).all())
    return launch


@pytest.mark.parametrize("format_name", ["affine", "binary_coding"])
@pytest.mark.parametrize("group_dim", GROUP_DIMS)
@pytest.mark.parametrize("size", [(3, 31, 8), (33, 65, 64), (17, 128, 32), (40, 300, None)])
def test_every_shape_and_grouping_is_multiplied(format_name, group_dim, size):
    *shape, group_size = size
    scheme = WeightScheme(num_bits=3, group_size=group_size, group_dim=group_dim)
    tensor = random_tensor(format_name, scheme, Shape2D(*shape), 0)
    check(tensor, normal(5, shape[1]).half())


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 9, 16])
@pytest.mark.parametrize("card", [SMALL, WIDE], ids=["small", "wide"])
def test_few_tokens_go_through_the_planes_in_one_launch(batch, card):
    tensor = random_tensor(
        "binary_coding", WeightScheme(num_bits=2, group_size=128), Shape2D(80, 1280), 1
    )
    launch = check(tensor, normal(batch, 1280).half(), card)
    assert launch.names == [planes.product_for(batch, planes.Layout(2, 128, 1), card).name]
    assert launch.calls[0].shared_bytes <= card.shared_bytes


@pytest.mark.parametrize(
    ("batch", "num_bits", "group", "name", "columns"),
    [
        (2, 4, 128, "bit_plane_imma", 2),
        *((batch, 4, 96, "bit_plane_lookup_mma", 8) for batch in (3, 8)),
        (9, 3, 128, "bit_plane_lookup_mma", 16),
        (17, 3, 128, "bit_plane_lookup_mma", 24),
        (25, 3, 128, "bit_plane_lookup_mma", 16),  # and another sixteen
        (4, 2, 192, "bit_plane_imma", 4),
        (5, 2, 128, "bit_plane_lookup_mma", 8),
        (3, 2, 96, "bit_plane_mma", 8),  # half a word of 64 inputs
        (5, 1, 128, "bit_plane_mma", 8),  # one product per weight all the same
        (3, 5, 128, "bit_plane_mma", 8),  # no registers for more planes
        (2, 8, 128, "bit_plane_imma", 2),
    ],
)
def test_few_tokens_are_multiplied_as_bytes_more_by_looking_up(
    batch, num_bits, group, name, columns
):
    found = planes.product_for(batch, planes.Layout(num_bits, group, 1), WIDE)
    assert (found.name, found.columns) == (name, columns)


@pytest.mark.parametrize(
    ("batch", "num_bits", "group", "name", "columns"),
    [
        (2, 4, 128, "bit_plane_imma", 2),
        (3, 4, 128, "bit_plane_codes_mma", 8),
        (4, 3, 128, "bit_plane_imma", 4),
        (5, 2, 128, "bit_plane_codes_mma", 8),
        (1, 8, 32, "bit_plane_codes_mma", 1),  # half a word of 64 inputs
        (2, 4, 96, "bit_plane_codes_mma", 8),
        (17, 3, 128, "bit_plane_codes_mma", 24),
    ],
)
def test_equal_steps_are_multiplied_as_codes(batch, num_bits, group, name, columns):
    found = planes.product_for(batch, planes.Layout(num_bits, group, planes.CENTERED), WIDE)
    assert (found.name, found.columns) == (name, columns)


def test_inputs_that_do_not_fit_into_shared_memory_are_cut_into_slabs():
    tensor = random_tensor(
        "binary_coding", WeightScheme(num_bits=1, group_size=256), Shape2D(64, 9216), 1
    )
    launch = check(tensor, normal(8, 9216).bfloat16(), SMALL)
    assert launch.names == [
        planes.product_for(8, planes.Layout(1, 256, 1), SMALL).name,
        "add_splits",
    ]
    assert launch.calls[0].grid[1] > 1
    assert launch.calls[0].shared_bytes <= SMALL.shared_bytes


@pytest.mark.parametrize("kilobytes", [99, 163, 227])
@pytest.mark.parametrize("num_bits", range(1, 9))
@pytest.mark.parametrize("group_size", [32, 64, 128, 192, 14336])
@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16])
def test_every_card_has_room_for_every_weight(kilobytes, num_bits, group_size, batch):
    card, layout = Card(132, kilobytes * 1024), planes.Layout(num_bits, group_size, 1)
    for row_tiles, units in ((8016, 16), (256, 56), (3584, 32)):
        chosen = plane_plans.tuned_plan(row_tiles, units, batch, layout, card=card)
        if chosen is None:
            assert (num_bits >= 7, kilobytes) == (True, 99)  # the dequantized weight's
            continue
        tuning, planned = chosen
        assert planned.shared_bytes * planned.per_multiprocessor <= kilobytes * 1024 + 1024
        assert planned.slabs * planned.units_per_slab >= units
        assert planned.ctas * planned.slabs <= 132 * tuning.per_multiprocessor * tuning.waves


def test_the_selection_asks_for_what_was_measured():
    layout, card = planes.Layout(4, 128, 1), Card(132, 227 * 1024, selection.H100.measured_on)

    def tuning(row_tiles, units, batch=1):
        found = plane_plans.tuned_plan(row_tiles, units, batch, layout, card=card)
        assert found is not None
        return replace(found[0], early=selection.ALL_STAGES), found[1].whole

    alone, pairs = selection.H100.alone, selection.H100.pairs
    whole = [(256, 16), (384, 16), (256, 56), (1792, 16), (8016, 16)]
    assert {tuning(*size, batch) for size in whole for batch in (1, 2, 8)} == {(alone, True)}
    assert tuning(1728, 16) == (pairs, False), "14 tiles for 124 CTAs leave 8 of 132 without work"
    assert tuning(1728, 16, batch=8) == tuning(3584, 32) == (alone, False)


ALL = None
"""Units of a ring, asked for before there are inputs."""


@pytest.mark.parametrize(
    ("num_bits", "offset", "shape", "as_bytes", "as_bits", "normed"),
    [
        (4, 2, (4096, 4096), (4, 1), None, (4, 1)),
        (3, 2, (4096, 14336), (4, 1), None, (4, 1)),
        (8, 2, (4096, 4096), (2, ALL), None, (2, ALL)),  # no room for a third stage
        (4, 1, (4096, 4096), (2, ALL), (2, ALL), (4, 1)),
        (4, 1, (4096, 14336), (2, 0), (4, 1), (4, 1)),
        (3, 1, (4096, 14336), (2, ALL), (4, 0), (4, 0)),
        (3, 1, (28672, 4096), (2, ALL), (3, 1), (4, 1)),
        (4, 1, (28672, 4096), (2, ALL), (2, ALL), (4, 1)),
    ],
    ids=str,
)
def test_weights_are_asked_for_behind_the_inputs_as_timed(
    num_bits, offset, shape, as_bytes, as_bits, normed
):
    layout, (rows, inputs) = planes.Layout(num_bits, 128, offset), shape
    plain = Card(132, 227 * 1024, "NVIDIA H200", warpgroups=True)
    counting = plain._replace(counts_bits=True)

    def asked(tokens, card, norm_eps=None):
        sizes = (rows, inputs, tokens, rows // 16, inputs // 256, inputs // 128, rows)
        around = plane_products.Around(norm_eps=norm_eps)
        call = plane_products.call_for(sizes, layout, torch.float16, card, around)
        return dict(call.constants)["STAGES"], dict(call.constants).get("EARLY", ALL)

    assert asked(1, plain) == as_bytes
    assert asked(1, counting) == (as_bits or as_bytes)
    assert asked(1, counting, 1e-5) == normed
    assert asked(8, plain)[1] is ALL


@given(row_tiles=st.integers(1, 3000), count=st.integers(1, 120), most=st.integers(1, 264))
def test_shares_hold_all_units_and_are_tiles_only_where_few_would_be_idle(row_tiles, count, most):
    ctas, share, whole = grids.shares_of(row_tiles, count, count, most)
    units = row_tiles * count
    assert 1 <= ctas <= most and units <= ctas * share
    assert whole == (-(-row_tiles // most) * count - units / most <= grids.MOST_IDLE)
    if whole:
        assert share % count == 0 and row_tiles > (ctas - 1) * share // count, "no CTA is empty"


def test_more_planes_leave_the_bit_planes_fewer_tokens():
    most = [selection.H100.most_tokens(planes) for planes in range(1, 9)]
    assert most == [160, 80, 48, 32, 32, 16, 16, 16]
    assert selection.H100.most_tokens(2, 4096 * 4096) == 24, "weights looked up"
    assert selection.H100.most_tokens(2, 4096 * 14336) == 80


def test_many_tokens_go_through_a_dequantized_weight():
    tensor = random_tensor(
        "binary_coding", WeightScheme(num_bits=4, group_size=64), Shape2D(24, 320), 2
    )
    assert check(tensor, normal(25, 320).bfloat16()).names == ["dequantize"]


def test_two_blocks_of_tokens_read_a_weight_twice(monkeypatch):
    monkeypatch.setenv("QTOOL_KERNEL", "planes")
    tensor = random_tensor(
        "binary_coding", WeightScheme(num_bits=4, group_size=64), Shape2D(24, 320), 2
    )
    assert check(tensor, normal(32, 320).half()).names == ["bit_plane_lookup_mma"]


@pytest.mark.parametrize("group_dim", GROUP_DIMS)
def test_rows_are_those_of_the_rounded_weight(group_dim):
    scheme = WeightScheme(num_bits=3, group_size=32, group_dim=group_dim)
    tensor = random_tensor("binary_coding", scheme, Shape2D(50, 96), 4)
    index = torch.tensor([[0, 49, 7], [7, 7, 31]])
    weight = linear_kernels.prepare(tensor, torch.float16)
    got = linear_kernels.rows(index, weight, Recorder())
    assert torch.equal(got, dequantized(tensor).half()[index])


@pytest.mark.parametrize("batch", [1, 16, 20])
def test_what_is_launched_is_decided_once_for_weights_of_one_shape(batch):
    scheme, calls = WeightScheme(num_bits=3, group_size=64), []
    for seed in (1, 2):
        tensor = random_tensor("binary_coding", scheme, Shape2D(40, 192), seed)
        weight = linear_kernels.prepare(tensor, torch.float16)
        x = normal(batch, 192).half()
        linear_kernels.matmul(x, weight, lambda call, _: calls.append(call), SMALL)
    assert calls[0] is calls[1]


def test_no_tokens_launch_nothing():
    tensor = random_tensor("binary_coding", WeightScheme(num_bits=3), Shape2D(16, 128), 4)
    got, launch = multiply(tensor, torch.empty(0, 128, dtype=torch.float16))
    assert got.shape == (0, 16)
    assert launch.names == []


@pytest.mark.parametrize("kernel", ["planes", "dequantize", "sign_flip"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_kernel_can_be_asked_for(kernel, batch):
    scheme = WeightScheme(num_bits=3, group_size=64)
    tensor = random_tensor("binary_coding", scheme, Shape2D(40, 192), 3)
    launch, x = Recorder(), normal(batch, 192).half()
    weight = linear_kernels.prepare(tensor, x.dtype, keep_stored=True)
    got = linear_kernels.matmul(x, weight, launch, SMALL, kernel=kernel)
    assert torch.allclose(
        got.double(), x.double() @ dequantized(tensor, torch.float64).T, 1e-2, 0.1
    )
    name = planes.product_for(batch, planes.Layout(3, 64, 1), SMALL).name
    assert launch.names == [name if kernel == "planes" else kernel]


def test_a_kernel_that_needs_what_was_not_kept_says_so():
    tensor = random_tensor("binary_coding", WeightScheme(num_bits=3), Shape2D(40, 128), 3)
    x = normal(1, 128).half()
    weight = linear_kernels.prepare(tensor, x.dtype)
    with pytest.raises(BackendError, match="keep_stored"):
        linear_kernels.matmul(x, weight, Recorder(), SMALL, kernel="sign_flip")


@pytest.mark.parametrize("batch", [1, 4, 5, 20])
@pytest.mark.parametrize("slabs", [False, True])
def test_a_residual_is_added(batch, slabs):
    inputs = 9216 if slabs else 320
    scheme = WeightScheme(num_bits=2, group_size=64)
    tensor = random_tensor("binary_coding", scheme, Shape2D(24, inputs), 3)
    x, residual = normal(batch, inputs).half(), normal(batch, 24).half()
    weight = linear_kernels.prepare(tensor, x.dtype)
    got = linear_kernels.matmul(x, weight, Recorder(), SMALL, residual=residual)
    expected = x.double() @ dequantized(tensor, torch.float64).T + residual.double()
    assert torch.allclose(got.double(), expected, 2e-3, 0.05)


@pytest.mark.parametrize("batch", [1, 3, 5, 20])
@pytest.mark.parametrize("slabs", [False, True])
def test_gate_and_up_are_multiplied_where_their_rows_alternate(batch, slabs):
    inputs = 9216 if slabs else 320
    scheme = WeightScheme(num_bits=2, group_size=64)
    gate, up = (
        random_tensor("binary_coding", scheme, Shape2D(24, inputs), seed) for seed in (1, 2)
    )
    x = (normal(batch, inputs) / inputs**0.5).half()
    fused = fusing.fuse([gate, up], x.dtype, interleave=True)
    assert fused is not None
    got = linear_kernels.matmul(x, fused.prepared, Recorder(), SMALL, gated=True)
    sides = [x.double() @ dequantized(tensor, torch.float64).T for tensor in (gate, up)]
    expected = torch.nn.functional.silu(sides[0]) * sides[1]
    assert torch.allclose(got.double(), expected, 4e-3, 4e-3)


def test_weights_of_one_input_are_fused_if_their_schemes_agree():
    scheme = WeightScheme(num_bits=2, group_size=64)
    tensors = [
        random_tensor(f, scheme, Shape2D(r, 96), 1) for f, r in [("affine", 8), ("affine", 3)]
    ]
    fused = fusing.fuse(tensors, torch.float16)
    assert fused is not None
    assert fused.prepared.shape == (11, 96)
    exact = torch.cat([dequantized(tensor, torch.float64) for tensor in tensors])
    torch.testing.assert_close(fused.prepared.dense().double(), exact, rtol=1e-3, atol=1e-3)
    other = random_tensor("affine", WeightScheme(num_bits=3, group_size=64), Shape2D(8, 96), 1)
    finer = random_tensor("affine", WeightScheme(num_bits=2, group_size=16), Shape2D(8, 96), 1)
    assert fusing.fuse([tensors[0], other], torch.float16) is None
    assert fusing.fuse([finer, finer], torch.float16) is None, "the tiles can't group its inputs"
    assert fusing.fuse(tensors, torch.float16, interleave=True) is None


def test_tables_run_one_token_where_they_were_measured_to_be_faster():
    def faster_with(tables):
        given = replace(selection.H100, tables=tables)
        return lambda rows, inputs, planes: given.prefers_tables(planes, Shape2D(rows, inputs))

    assert not any(map(selection.H100.prefers_tables, range(1, 9), [Shape2D(4096, 4096)] * 8))
    assert "lut" not in str(selection.H100)
    # before CTAs had whole tiles: at 4096 x 4096 with 2, 3 and 4 planes, at 6144 x 4096 with 2
    faster = faster_with(range(2**24, 2**26))
    assert [faster(4096, 4096, planes) for planes in range(1, 6)] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert [faster(6144, 4096, planes) for planes in (2, 3, 4)] == [True, False, False]
    assert not any(faster(*shape, 2) for shape in [(28672, 4096), (4096, 14336), (8192, 28672)])
    assert not faster(2048, 2048, 4), "what is smaller wasn't measured"


@pytest.mark.parametrize("with_residual", [False, True])
def test_tables_are_chosen_for_one_token_of_such_a_weight(monkeypatch, with_residual):
    small = replace(selection.H100, tables=range(1000, 100_000))
    monkeypatch.setattr(linear_kernels, "selection_for", lambda _: small)
    scheme = WeightScheme(num_bits=3, group_size=64)
    tensor = random_tensor("binary_coding", scheme, Shape2D(24, 1100), 0)
    weight = linear_kernels.prepare(tensor, torch.float16)
    names = []
    for batch in (1, 2):
        x = (normal(batch, 1100) / 1100**0.5).half()
        residual, launch = normal(batch, 24, seed=1).half() if with_residual else None, Recorder()
        got = linear_kernels.matmul(x, weight, launch, SMALL, residual=residual)
        expected = x.double() @ dequantized(tensor, torch.float64).T
        expected = expected if residual is None else expected + residual.double()
        torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=2e-3)
        names += launch.names
    assert names == ["lut_gemm", "add_splits", "bit_plane_imma"]
    monkeypatch.setenv("QTOOL_KERNEL", "planes")
    assert linear_kernels.prepare(tensor, torch.float16).stored is None
    pair = [random_tensor("binary_coding", scheme, Shape2D(24, 320), seed) for seed in (1, 2)]
    monkeypatch.delenv("QTOOL_KERNEL")
    fused = fusing.fuse(pair, torch.float16, interleave=True)
    assert fused is not None and fused.prepared.stored is None
    kept, x = replace(fused.prepared, stored=tensor), normal(1, 320).half()
    got = linear_kernels.matmul(x, kept, launch := Recorder(), SMALL, gated=True)
    assert got.shape == (1, 24) and launch.names == ["bit_plane_imma"], "tables have no gate"


@pytest.mark.parametrize("kernel", [None, "sign_flip", "lut"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("num_bits", [2, 8])
def test_offsets_of_affine_weights_are_not_rounded(kernel, batch, symmetric, num_bits):
    """Equal inputs sum up what is wrong with an offset; what is wrong with others cancels."""
    scheme = WeightScheme(num_bits=num_bits, group_size=128, symmetric=symmetric)
    tensor = random_tensor("affine", scheme, Shape2D(24, 512), 0)
    x = torch.ones(batch, 512).half()
    expected = x.double() @ dequantized(tensor, torch.float64).T
    steps = tensor.parts["scales"].double().abs().sum(1)  # of one level, over the groups
    weight = linear_kernels.prepare(tensor, torch.float16, keep_stored=True)
    got = linear_kernels.matmul(x, weight, Recorder(), SMALL, kernel=kernel).double()
    allowed = expected.abs() * 2**-11 + 1e-3 * steps
    assert bool(((got - expected).abs() <= allowed).all())


def test_what_torch_and_the_kernels_make_of_an_affine_weight_is_the_same():
    tensor = random_tensor("affine", WeightScheme(num_bits=8, group_size=64), Shape2D(24, 300), 0)
    weight = linear_kernels.prepare(tensor, torch.float16)
    exact = dequantized(tensor, torch.float64).half()
    for got in (weight.dense(), linear_kernels.dense_weight(weight, Recorder())):
        torch.testing.assert_close(got, exact, rtol=2**-10, atol=0)
        assert (got != exact).double().mean() < 0.01


@pytest.mark.parametrize("group_dim", GROUP_DIMS)
@pytest.mark.parametrize("shape", [(40, 300), (33, 2000)], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 3, 20])
def test_a_product_fills_its_columns_of_something_wider(group_dim, shape, batch):
    scheme = WeightScheme(num_bits=3, group_size=32, group_dim=group_dim)
    tensor = random_tensor("binary_coding", scheme, Shape2D(*shape), 0)
    weight, x = linear_kernels.prepare(tensor, torch.float16), normal(batch, shape[1]).half()
    whole = torch.full((batch, 7 + shape[0] + 5), torch.nan, dtype=torch.float16)
    own = whole[:, 7:-5]
    linear_kernels.matmul_into(own, x, weight, Recorder(), SMALL, None)
    assert torch.equal(own, linear_kernels.matmul(x, weight, Recorder(), SMALL))
    assert bool(whole[:, :7].isnan().all()) and bool(whole[:, -5:].isnan().all())
