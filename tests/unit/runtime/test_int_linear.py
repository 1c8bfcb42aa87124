"""Quantized inputs times weights in tiles: which weights, what launches; on a card, the results."""

from dataclasses import replace

import pytest
import torch

from qtool.core.activations import quantize_activations
from qtool.runtime.backends.cuda import int_linear, int_tiles, integers
from qtool.runtime.backends.cuda.int_linear import GemmTuning
from qtool.runtime.backends.cuda.launch import WARPGROUPS, Card
from qtool.scheme import ActivationScheme, WeightScheme
from qtool.steps.plan import load_method
from tests.helpers import dequantized, normal, problem

H200 = Card(132, 227 * 1024)
AFTER_CAST = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


def rounded(shape, method="rtn", **scheme):
    solver = load_method(method)
    given = problem(normal(*shape) + 0.3, WeightScheme(**{"num_bits": 4, **scheme}))
    return solver.solve(given, solver.options()).tensor


def tiled(tensor):
    made = int_tiles.tile_integers(tensor)
    assert made is not None
    return made


def product_of(tensor, dtype):
    made = integers.integer_product(on_card(tensor), dtype)
    assert made is not None
    return made


BITS = [
    (rounded((8, 256)), 4),
    (rounded((8, 256), num_bits=2, group_size=256), 4),
    (rounded((8, 256), group_size=None), 4),
    (rounded((8, 256), num_bits=5), 8),
    (rounded((8, 256), num_bits=8, symmetric=True), 8),
    (rounded((8, 256), "dint"), 8),
    (rounded((8, 256), num_bits=8), None),  # beyond a byte
    (rounded((8, 256), group_size=64), None),
    (rounded((8, 256), group_dim="out_features"), None),
    (rounded((8, 200)), None),
    (rounded((8, 200), group_size=None), None),
]


@pytest.mark.parametrize(("tensor", "bits"), BITS)
def test_weights_of_whole_blocks_and_of_bytes_have_tiles(tensor, bits):
    assert int_tiles.bits_of_tiles(tensor) == bits
    made = int_tiles.tile_integers(tensor)
    assert (made is None) == (bits is None)
    assert int_tiles.tile_bytes(tensor) == (0 if made is None else made.tiles.nbytes)
    assert integers.integer_bytes(tensor) >= int_tiles.tile_bytes(tensor)
    assert integers.integer_bytes(replace(tensor, parts={})) == integers.integer_bytes(tensor)


def test_elsewhere_than_on_a_card_weights_in_groups_have_no_integers():
    assert integers.integer_product(rounded((8, 256)), torch.float16) is None
    product = integers.integer_product(rounded((8, 256), group_size=None), torch.float16)
    assert isinstance(product, integers.RowIntegers)


@pytest.mark.parametrize(
    ("rows", "tokens", "cluster"), [(256, 513, 2), (100, 1, 2), (4096, 512, 1)]
)
@pytest.mark.parametrize("num_bits", [4, 5])
def test_a_launch_fits_the_card(rows, tokens, cluster, num_bits):
    packed = tiled(rounded((rows, 128), num_bits=num_bits))
    tuning = GemmTuning(stages=20, cluster=cluster)
    call = int_linear.gemm_call(tokens, packed, torch.float16, H200, tuning)
    macros = dict(call.constants)
    assert call.one_architecture
    assert call.shared_bytes <= H200.shared_bytes - 1024
    assert macros["CLUSTER"] == (cluster if rows > 128 else 1)
    assert 0 < call.grid[0] <= 132
    assert call.grid[0] % macros["CLUSTER"] == 0
    quantize = int_linear.quantize_call(tokens, 128, torch.float16, ActivationScheme())
    assert quantize.grid[0] * dict(quantize.constants)["ROWS"] == -(-tokens // 128) * 128


WEIGHTS = {
    "4 bits": {},
    "4 bits, symmetric": {"symmetric": True},
    "4 bits, groups of 256": {"group_size": 256},
    "4 bits, rows": {"group_size": None},
    "5 bits": {"num_bits": 5},
    "8 bits": {"num_bits": 8, "symmetric": True},
    "8 bits, rows": {"num_bits": 8, "symmetric": True, "group_size": None},
    "8 bits, rows, not symmetric": {"num_bits": 8, "group_size": None},
    "dint": {"method": "dint"},
}
INPUTS = [
    ActivationScheme(),
    ActivationScheme(num_bits=6, clip_ratio=0.9, rounding=0.05),
    ActivationScheme(granularity="tensor", scale=0.04),
]


def expected(x, scheme, tensor):
    codes, steps = quantize_activations(x, scheme)
    return (codes.double() @ dequantized(tensor, torch.float64).T) * steps.double()


def assert_near(y, wanted, dtype):
    size = AFTER_CAST[dtype]
    torch.testing.assert_close(y.cpu().double(), wanted, rtol=size, atol=size * float(wanted.std()))


@pytest.fixture
def hopper():
    if torch.cuda.get_device_capability() != WARPGROUPS:
        pytest.skip("the kernel is for compute capability 9.0")


def on_card(tensor):
    return replace(tensor, parts={name: part.cuda() for name, part in tensor.parts.items()})


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("scheme", INPUTS, ids=str)
@pytest.mark.parametrize("dtype", AFTER_CAST)
@pytest.mark.parametrize("kind", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("shape", [(256, 2432), (300, 640)])
def test_a_card_multiplies_as_defined(shape, kind, dtype, scheme):
    tensor = rounded(shape, **kind)
    product = product_of(tensor, dtype)
    for tokens in (1, 127, 128, 129, 513):
        x = normal(tokens, shape[1], seed=tokens).to(dtype)
        y = product.linear(x.cuda(), scheme)
        assert y.dtype == dtype
        assert_near(y, expected(x, scheme, tensor), dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("stages", [2, 6])
def test_rings_and_clusters_give_the_same_bits(stages, cluster):
    from qtool.runtime.backends.cuda import driver

    tensor, x = rounded((4096, 2048)), normal(700, 2048).half()
    packed, card = tiled(on_card(tensor)), driver.card_of(0)
    tuning, scheme = GemmTuning(stages=stages, cluster=cluster), ActivationScheme()
    first = int_linear.int_linear(x.cuda(), packed, scheme, driver.launch, card, tuning)
    assert_near(first, expected(x, scheme, tensor), torch.float16)
    for _ in range(20):
        again = int_linear.int_linear(x.cuda(), packed, scheme, driver.launch, card, tuning)
        assert torch.equal(again, first)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("scheme", INPUTS, ids=str)
@pytest.mark.parametrize("dtype", AFTER_CAST)
@pytest.mark.parametrize(("tokens", "features"), [(3, 128), (130, 14336), (5, 57344)])
def test_a_card_quantizes_as_defined(tokens, features, dtype, scheme):
    from qtool.runtime.backends.cuda import driver

    x = normal(tokens, features).to(dtype)
    padded = -(-tokens // 128) * 128
    codes = torch.empty(padded * features, dtype=torch.int8, device="cuda")
    steps = torch.empty(padded, device="cuda")
    driver.launch(
        int_linear.quantize_call(tokens, features, dtype, scheme), (x.cuda(), codes, steps)
    )
    wanted, step = quantize_activations(x, scheme)
    tiles = codes.cpu().view(-1, features // 128, 8, 128, 16)
    got = tiles.permute(0, 3, 1, 2, 4).reshape(padded, features)
    assert torch.equal(steps.cpu()[:tokens], step.squeeze(1))
    assert torch.equal(got[:tokens], wanted)
    assert not bool(got[tokens:].any())


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_a_captured_product_gives_the_same():
    tensor, x = rounded((256, 512)), normal(200, 512).half().cuda()
    product = product_of(tensor, torch.float16)
    plain = product.linear(x, ActivationScheme())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = product.linear(x, ActivationScheme())
    graph.replay()
    assert torch.equal(captured, plain)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_shapes_that_leave_some_tokens_or_none():
    tensor = rounded((256, 512))
    product = product_of(tensor, torch.float16)
    x = normal(401, 512).half()
    for part in (x[1:], x[:0], x[::2]):
        y = product.linear(part.cuda(), ActivationScheme())
        assert y.shape == (len(part), 256)
        if len(part):
            assert_near(y, expected(part, ActivationScheme(), tensor), torch.float16)
