"""Products of many tokens: the kernels' own text, on the CPU, against the weight rounded once."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from qtool.errors import BackendError
from qtool.runtime.backends.cuda import driver, fusing, linear_kernels, mixed, selection, wide
from qtool.runtime.backends.cuda.launch import Card
from qtool.runtime.backends.cuda.mixed import MixedWeight
from qtool.runtime.backends.cuda.planes import Layout, Target
from qtool.runtime.backends.cuda.selection import WideTuning
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import dequantized, normal
from tests.kernels.host import Recorder

ROOM = 227 * 1024
AFTER_CAST = {torch.float16: 5e-4, torch.bfloat16: 4e-3}
WEIGHTS = {
    "3 planes": ("binary_coding", 3, 128, (128, 768)),
    "4 planes, the last tile ragged": ("binary_coding", 4, 128, (83, 512)),
    "2 planes, groups of 64": ("binary_coding", 2, 64, (64, 512)),
    "1 plane, a group per row": ("binary_coding", 1, None, (64, 600)),
    "groups of 32": ("binary_coding", 3, 32, (64, 256)),
    "groups of 192": ("binary_coding", 4, 192, (64, 1000)),
    "groups of 96": ("binary_coding", 2, 96, (64, 777)),
    "5 planes, groups of 32": ("binary_coding", 5, 32, (64, 256)),
    "8 bits, affine": ("affine", 8, 128, (64, 512)),
    "4 bits, affine": ("affine", 4, 128, (96, 512)),
    "3 bits, affine, groups of 96": ("affine", 3, 96, (64, 576)),
    "5 bits, affine, groups of 32": ("affine", 5, 32, (64, 256)),
}


class Poisoned(Recorder):
    """Fills the places of ordered inputs and of parts with NaN: what is read too soon shows."""

    def __call__(self, call, tensors):
        for place in (tensors[3], tensors[-1]):
            place.fill_(torch.nan)
        super().__call__(call, tensors)


def multiplied(
    weight, x, tuning, ctas, *, epilogue="none", residual=None, places=None, launch=None
):
    """Return the product, and the launches; y is as wide as there are outputs."""
    launch, shape = launch or Poisoned(), weight.shape
    width = shape.out_features // (2 if epilogue == "gated" else 1)
    y = torch.full((len(x), width), torch.nan, dtype=x.dtype)
    wide.multiply_wide(
        *(x, weight.tiles, shape, weight.layout, launch, Card(ctas, ROOM)),
        tuning=tuning,
        target=Target(y, places),
        epilogue=epilogue,
        residual=residual,
    )
    assert launch.names == ["bit_plane_wgmma"]
    return y, launch


def close(y, x, weight, *, twice=False):
    """Compare with the product in float64 of the weight as dense backends have it.

    So all that differs are float32 sums and the cast of y, but for more than four planes, which are
    rounded twice.
    """
    expected, dense = x.double() @ weight.dense().double().T, weight.dense().double()
    more = torch.finfo(x.dtype).eps if twice or weight.scheme.num_bits > 4 else 0.0
    allowed = (1e-6 + more) * (x.double().abs() @ dense.abs().T)
    error = (y.double() - expected).abs()
    assert bool((error <= allowed + AFTER_CAST[y.dtype] * expected.abs()).all())


HALF, BFLOAT = AFTER_CAST


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(name, (HALF, BFLOAT)[place % 2]) for place, name in enumerate(WEIGHTS)]
    + [("3 planes", BFLOAT), ("5 planes, groups of 32", BFLOAT)],
)
def test_products_are_those_of_the_weight_rounded_once(kind, dtype):
    name, bits, group_size, shape = WEIGHTS[kind]
    tensor = random_tensor(
        name, WeightScheme(num_bits=bits, group_size=group_size), Shape2D(*shape), 0
    )
    weight, x = linear_kernels.prepare(tensor, dtype), normal(17, shape[1]).to(dtype)
    y, _ = multiplied(weight, x, WideTuning(columns=32, groups=1), ctas=2)
    close(y, x, weight)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("4 planes, the last tile ragged", torch.bfloat16),
        ("groups of 192", torch.float16),
        ("4 bits, affine", torch.bfloat16),
    ],
)
def test_four_planes_and_a_sign_are_rounded_once_more(name, dtype):
    name, bits, group_size, shape = WEIGHTS[name]
    tensor = random_tensor(
        name, WeightScheme(num_bits=bits, group_size=group_size), Shape2D(*shape), 0
    )
    weight, x = linear_kernels.prepare(tensor, dtype), normal(17, shape[1]).to(dtype)
    tuning = WideTuning(columns=32, groups=1, fine=True, mirrored=True)
    y, _ = multiplied(weight, x, tuning, ctas=2)
    close(y, x, weight, twice=True)


@pytest.mark.parametrize(
    ("ctas", "tokens", "tuning"),
    [
        (1, 16, WideTuning(columns=16, groups=2, x_blocks=2, fine=True)),
        (3, 20, WideTuning(columns=16, groups=1, x_blocks=2)),  # tiles of tokens, parts of a half
        (5, 33, WideTuning(columns=48, groups=3)),
        (12, 9, WideTuning(columns=16, groups=1)),  # a tile is of several blocks
        (99, 1, WideTuning(columns=16, groups=1, x_blocks=2)),  # no more blocks than units
        (4, 40, WideTuning(columns=48, groups=1, x_blocks=2, w_units=2)),
        (6, 20, WideTuning(columns=32, groups=2, w_units=2)),
        (6, 9, WideTuning(columns=16, groups=1)),  # the first block of a tile adds up all
        (6, 100, WideTuning(columns=128, groups=1)),  # four slices, of one owner or several
    ],
)
def test_any_number_of_blocks_shares_a_weight(ctas, tokens, tuning):
    scheme, shape = WeightScheme(num_bits=3, group_size=128), Shape2D(140, 1200)
    weight = linear_kernels.prepare(random_tensor("binary_coding", scheme, shape, 1), torch.float16)
    x = normal(tokens, shape.in_features).half()
    y, launch = multiplied(weight, x, tuning, ctas)
    close(y, x, weight)
    tiles = -(-shape.out_features // (64 * tuning.groups)) * -(-tokens // tuning.columns)
    assert launch.calls[0].grid == (min(ctas, 5 * tiles), 1, 1)


@pytest.mark.parametrize(
    ("ctas", "tokens", "seed"), [(4, 9, 2), (6, 40, 1), (8, 33, 8), (7, 9, 25)]
)
def test_blocks_wait_for_warps_that_are_slower(ctas, tokens, seed):
    scheme, shape = WeightScheme(num_bits=2, group_size=128), Shape2D(256, 700)
    weight = linear_kernels.prepare(random_tensor("binary_coding", scheme, shape, 1), torch.float16)
    x = normal(tokens, 700).half()
    tuning = WideTuning(columns=16, groups=1, x_blocks=2)
    y, _ = multiplied(weight, x, tuning, ctas, launch=Poisoned(seed))
    close(y, x, weight)


HOPPER = Card(4, ROOM, selection.H100.measured_on, warpgroups=True)


@pytest.mark.parametrize("num_bits", range(1, 9))
@pytest.mark.parametrize("group", [32, 64, 96, 128, 192, 14336])
def test_there_is_room_for_every_weight_and_as_asked_for_those_measured(num_bits, group):
    layout = Layout(num_bits, group, 1)
    for tokens, rows in ((1, 64), (64, 28672), (128, 28672), (256, 28672), (4000, 4096)):
        asked = selection.H100.wide_tuning(tokens, rows, num_bits)
        found = wide.tuned_wide(tokens, rows, 16, layout, HOPPER)
        assert found is not None and found.columns <= asked.columns
        assert found == asked or num_bits > 4 or group != 128
        assert wide.tuned_wide(tokens, rows, 16, layout, HOPPER._replace(warpgroups=False)) is None


def test_tokens_choose_the_product_of_many_where_it_was_measured_to_be_faster():
    large, small = Shape2D(28672, 4096), Shape2D(4096, 4096)
    chosen = {
        bits: [t for t in (8, 9, 16, 17, 64, 256, 2000) if selection.H100.is_wide(bits, t, large)]
        for bits in (2, 3, 4, 8)
    }
    many = [17, 64, 256]
    assert chosen == {2: many, 3: many, 4: many, 8: [16, *many]}
    assert selection.H100.is_wide(8, 17, small)
    assert selection.H100.is_wide(4, 1024, large) and not selection.H100.is_wide(8, 1024, large)
    assert selection.H100.is_wide(4, 1024, small) and not selection.H100.is_wide(8, 257, small)
    tuning = selection.H100.wide_tuning
    assert tuning(40, 28672, 3) == WideTuning(48, 2, 2, w_units=2)
    assert tuning(64, 28672, 3) == WideTuning(64, 4, 2, w_units=2)
    assert tuning(64, 28672, 4) == WideTuning(64, 4, 2, w_units=2, mirrored=True)
    assert tuning(64, 4096, 4) == WideTuning(64, 2, 2, mirrored=True)
    assert tuning(64, 4096, 2) == WideTuning(64, 2, 2, w_units=2)
    assert tuning(65, 28672, 3) == WideTuning(96, 2, 2, w_units=2)
    assert tuning(128, 4096, 4) == WideTuning(128, 2, 2)
    assert tuning(128, 4096, 8) == WideTuning(128, 2, 1)
    assert tuning(256, 28672, 3) == WideTuning(256, 2, 1, w_units=2)
    assert tuning(300, 28672, 4) == WideTuning(192, 2, 1, w_units=2), (
        "two tiles, as little empty as can be"
    )


def test_equal_steps_have_a_choice_of_their_own():
    large = Shape2D(28672, 4096)
    assert not selection.H100.is_wide(8, 16, large, equal_steps=True)
    assert all(selection.H100.is_wide(bits, 17, large, equal_steps=True) for bits in (2, 3, 4, 8))
    assert selection.H100.is_wide(4, 1024, large, equal_steps=True)
    huge = Shape2D(57344, 8192)  # sixteen tokens' inputs don't fit
    assert [t for t in (8, 9, 16) if selection.H100.is_wide(4, t, huge, equal_steps=True)] == [
        9,
        16,
    ]
    tuning = selection.H100.wide_tuning(64, 28672, 4, equal_steps=True)
    assert not tuning.mirrored
    assert selection.H100.wide_tuning(32, 4096, 4, equal_steps=True).w_units == 2


def test_fewer_warpgroups_do_not_multiply_as_four_would():
    assert wide.tuned_wide(32, 28672, 16, Layout(8, 128, 1), HOPPER) == WideTuning(
        32, 4, 2, fine=True
    )
    assert wide.tuned_wide(64, 28672, 16, Layout(8, 128, 1), HOPPER) == WideTuning(64, 2, 2)


@pytest.mark.parametrize(
    ("tokens", "how"), [(25, "plain"), (25, "residual"), (25, "gated"), (40, "plain")]
)
def test_the_backend_runs_what_was_chosen(tokens, how):
    scheme = WeightScheme(num_bits=2, group_size=64)
    pair = [random_tensor("binary_coding", scheme, Shape2D(40, 320), seed) for seed in (1, 2)]
    fused = fusing.fuse(pair, torch.float16, interleave=how == "gated")
    assert fused is not None
    x, launch = (normal(tokens, 320) / 320**0.5).half(), Recorder()
    residual = normal(tokens, 80).half() if how == "residual" else None
    gated = how == "gated"
    got = linear_kernels.matmul(x, fused.prepared, launch, HOPPER, residual=residual, gated=gated)
    assert launch.names == ["bit_plane_wgmma"]
    sides = [x.double() @ dequantized(tensor, torch.float64).T for tensor in pair]
    expected = functional.silu(sides[0]) * sides[1] if gated else torch.cat(sides, 1)
    expected = expected if residual is None else expected + residual.double()
    torch.testing.assert_close(got.double(), expected, rtol=4e-3, atol=4e-3)


def test_classes_of_rows_go_to_their_places():
    rows = ((4, 40), (2, 30))
    scheme = WeightScheme(num_bits=4, group_size=64, rows=rows)
    tensor = random_tensor("mixed_rows", scheme, Shape2D(70, 320), 1)
    prepared, x = mixed.prepare_weight(tensor, torch.float16), normal(25, 320).half()
    assert isinstance(prepared, MixedWeight)
    got = mixed.multiply_mixed(x, prepared, launch := Recorder(), HOPPER)
    assert launch.names == ["bit_plane_wgmma"] * 2
    expected = x.double() @ dequantized(tensor, torch.float64).T
    torch.testing.assert_close(got.double(), expected, rtol=4e-3, atol=0.1)
    assert mixed.kernels_for(prepared, 9, HOPPER) == "planes", "all classes at once"


def test_what_cannot_run_it_says_so():
    scheme = WeightScheme(num_bits=2, group_size=64)
    tensor = random_tensor("binary_coding", scheme, Shape2D(16, 64), 0)
    weight, x = linear_kernels.prepare(tensor, torch.float16), normal(20, 64).half()
    with pytest.raises(BackendError, match="needs compute capability"):
        linear_kernels.matmul(x, weight, Recorder(), Card(2, ROOM), kernel="wide")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("dtype", AFTER_CAST)
def test_products_on_a_card_are_those_of_the_weight_rounded_once_or_of_a_sign_twice(kind, dtype):
    card = driver.card_of(0)
    if not card.warpgroups:
        pytest.skip("it has no wgmma")
    name, bits, group_size, shape = kind
    scheme = WeightScheme(num_bits=bits, group_size=group_size)
    tensor = random_tensor(name, scheme, Shape2D(8 * shape[0], 3 * shape[1]), 0)
    moved = replace(tensor, parts={part: values.cuda() for part, values in tensor.parts.items()})
    weight = linear_kernels.prepare(moved, dtype)
    for tokens in (1, 40, 64, 129, 256, 300):
        x = normal(tokens, 3 * shape[1]).to("cuda", dtype)
        y, again = (
            linear_kernels.matmul(x, weight, driver.launch, card, kernel="wide") for _ in range(2)
        )
        assert torch.equal(y, again)
        close(y, x, weight, twice=bits == 4 and tokens <= 64)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "bits"), [("binary_coding", 3), ("binary_coding", 4), ("affine", 4), ("affine", 8)]
)
def test_few_tokens_are_right_where_four_warpgroups_multiply_them(name, bits):
    card = driver.card_of(0)
    if not card.warpgroups:
        pytest.skip("it has no wgmma")
    shape = Shape2D(24576 + 16, 768)
    tensor = random_tensor(name, WeightScheme(num_bits=bits, group_size=128), shape, 0)
    moved = replace(tensor, parts={part: values.cuda() for part, values in tensor.parts.items()})
    weight = linear_kernels.prepare(moved, torch.float16)
    tuning = linear_kernels.wide_tuning(weight, 16, card)
    assert tuning is not None and (tuning.columns, tuning.groups) == (16, 4)
    for tokens in (9, 16):
        x = normal(tokens, 768).to("cuda", torch.float16)
        y = linear_kernels.matmul(x, weight, driver.launch, card, kernel="wide")
        close(y, x, weight, twice=bits == 4 and name == "binary_coding")
