"""Bit planes on a card: blocks that have whole tiles or share them, and norms in a product."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from qtool.runtime.backends.cuda import (
    driver,
    grids,
    linear_kernels,
    plane_plans,
    plane_products,
)
from qtool.runtime.backends.cuda.decode_ops import KernelOps
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.decode.ops import Norm
from qtool.runtime.decode.torch_ops import rms_norm
from qtool.scheme import Shape2D, WeightScheme
from qtool.timing.synthetic import generator_on, random_weight
from tests.contract.test_codecs import random_tensor
from tests.helpers import normal

pytestmark = pytest.mark.gpu
EPS = 1e-5
CACHED = [(plane_plans, "plan_launch"), (plane_plans, "tuned_plan"), (plane_products, "call_for")]


def weight(num_bits, shape, group_size=128):
    scheme = WeightScheme(num_bits=num_bits, group_size=group_size)
    made = random_weight(Shape2D(*shape), scheme, generator_on(torch.device("cuda")))
    assert isinstance(made, KernelWeight)
    return made


@pytest.mark.parametrize("idle", [-1, 10_000], ids=["shared tiles", "whole tiles"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("shape", [(4096, 4096), (6000, 4096), (100, 14336)])
@torch.no_grad()
def test_products_are_those_of_the_dequantized_weight(shape, tokens, idle, monkeypatch):
    monkeypatch.setattr(grids, "MOST_IDLE", idle)
    for module, name in CACHED:
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    card, made = driver.card_of(0), weight(3, shape)
    exact = linear_kernels.dense_weight(made, driver.launch).double()
    for seed in range(3):
        x = normal(tokens, shape[1], seed=seed).half().cuda()
        y = linear_kernels.matmul(x, made, driver.launch, card, kernel="planes").double()
        expected = x.double() @ exact.T
        assert float((y - expected).norm() / expected.norm()) < 5e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [64, 96, None])
@pytest.mark.parametrize("num_bits", [2, 3, 4])
@pytest.mark.parametrize("tokens", [5, 13, 24])
@pytest.mark.parametrize("rows", [600, 28000], ids=["few rows", "streamed"])
@torch.no_grad()
def test_weights_looked_up_are_those_rounded_once_or_twice(
    num_bits, group_size, dtype, tokens, rows
):
    made = replace(weight(num_bits, (rows, 1344), group_size), dtype=dtype)
    dense = linear_kernels.dense_weight(made, driver.launch).double()
    x = normal(tokens, 1344).to(dtype).cuda()
    y = plane_products.by_planes(x, made, driver.launch, driver.card_of(0)).double()
    expected, terms = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    eps = torch.finfo(dtype).eps
    allowed = (2e-6 + (eps if num_bits == 4 else 0)) * terms + eps * expected.abs()
    assert bool(((y - expected).abs() <= allowed).all())


@pytest.mark.parametrize("group_size", [32, 64, 96])
@pytest.mark.parametrize("num_bits", [3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 13, 40])
@torch.no_grad()
def test_equal_steps_are_multiplied_as_in_float64(num_bits, group_size, tokens):
    dtype = torch.bfloat16 if group_size == 64 or tokens == 1 else torch.float16
    scheme = WeightScheme(num_bits=num_bits, group_size=group_size)
    tensor = random_tensor("affine", scheme, Shape2D(600, 1344), 0)
    parts = {name: part.cuda() for name, part in tensor.parts.items()}
    made = linear_kernels.prepare(replace(tensor, parts=parts), dtype)
    x = normal(tokens, 1344).to(dtype).cuda()
    y = linear_kernels.matmul(x, made, driver.launch, driver.card_of(0)).double()
    exact = replace(made, dtype=torch.float32).dense().double()
    terms = x.double().abs() @ exact.abs().T
    eps = torch.finfo(dtype).eps  # of weights that many tokens have in 16 bit, and of y
    assert bool(((y - x.double() @ exact.T).abs() <= eps * terms).all())
    if tokens <= 24:
        y = plane_products.by_planes(x, made, driver.launch, driver.card_of(0)).double()
        allowed = 2e-6 * terms + eps / 2 * (x.double() @ exact.T).abs()
        assert bool(((y - x.double() @ exact.T).abs() <= allowed).all())


@pytest.mark.parametrize("shape", [(600, 1280), (100, 28672)], ids=["few", "two CTAs stage"])
@pytest.mark.parametrize(
    ("fmt", "num_bits", "group_size"),
    [
        *(("binary_coding", bits, group) for bits in (1, 2, 3, 4) for group in (128, None)),
        *(("affine", bits, 128) for bits in (2, 3, 4, 8)),
    ],
)
@pytest.mark.parametrize("tokens", [1, 2])
@torch.no_grad()
def test_few_tokens_are_as_in_float64(fmt, num_bits, group_size, shape, tokens):
    dtype = torch.bfloat16 if group_size is None or num_bits == 8 else torch.float16
    scheme = WeightScheme(num_bits=num_bits, group_size=group_size, symmetric=num_bits == 3)
    tensor = random_tensor(fmt, scheme, Shape2D(*shape), 0)
    parts = {name: part.cuda() for name, part in tensor.parts.items()}
    made = linear_kernels.prepare(replace(tensor, parts=parts), dtype)
    exact = replace(made, dtype=torch.float32).dense().double()
    eps = torch.finfo(dtype).eps
    for outliers in (1, 30):
        x = normal(tokens, shape[1], seed=outliers)
        x[:, ::97] *= outliers
        x = x.to(dtype).cuda()
        y = linear_kernels.matmul(x, made, driver.launch, driver.card_of(0), kernel="planes")
        expected, terms = x.double() @ exact.T, x.double().abs() @ exact.abs().T
        assert bool(((y - expected).abs() <= 2e-6 * terms + eps / 2 * expected.abs()).all())


@pytest.mark.parametrize("num_bits", [2, 4])
@pytest.mark.parametrize("tokens", [1, 2])
@torch.no_grad()
def test_replays_of_products_that_norm_read_what_the_one_before_wrote(num_bits, tokens):
    card = driver.card_of(0)
    made = [weight(num_bits, (4096, 4096)) for _ in range(2)]
    exact = [linear_kernels.dense_weight(one, driver.launch).double() for one in made]
    norm = Norm(torch.rand(4096, device="cuda").half() + 0.5, EPS)
    assert linear_kernels.can_norm(made[0], tokens, card)
    ops, x = KernelOps(driver.launch, card), normal(tokens, 4096).half().cuda()

    def chain():
        ys = [x]
        for index in range(6):
            ys.append(ops.linear(ys[-1], made[index % 2], norm=norm))
        return ys

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        chain()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        captured = chain()
    for seed in range(5):
        x.copy_(normal(tokens, 4096, seed=seed))
        graph.replay()
        for index, (given, y) in enumerate(pairwise(captured)):
            expected = rms_norm(given, *norm).double() @ exact[index % 2].T
            assert float((y.double() - expected).norm() / expected.norm()) < 6e-4
