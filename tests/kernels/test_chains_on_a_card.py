"""Chains on a card: right, in graphs, on two streams at once, and in whole steps."""

import pytest
import torch

from qtool.runtime.backends.cuda import chains, driver, linear_kernels
from qtool.runtime.backends.cuda.chains import Link
from qtool.runtime.backends.cuda.decode_ops import KernelOps
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.decode.ops import Norm
from qtool.runtime.decode.runner import DecodeRunner
from qtool.runtime.decode.torch_ops import rms_norm, silu_times
from qtool.runtime.decode.weights import DecoderLayer, DecoderShape, DecoderWeights
from qtool.scheme import Shape2D, WeightScheme
from qtool.timing.synthetic import generator_on, random_weight
from tests.helpers import normal

pytestmark = pytest.mark.gpu
HIDDEN, INNER, QKV, EPS = 2048, 5632, 3072, 1e-5


def weight(num_bits, outputs, inputs) -> KernelWeight:
    scheme = WeightScheme(num_bits=num_bits, group_size=128)
    made = random_weight(Shape2D(outputs, inputs), scheme, generator_on(torch.device("cuda")))
    assert isinstance(made, KernelWeight)
    return made


def gains() -> torch.Tensor:
    return torch.rand(HIDDEN, device="cuda").half() + 0.5


def links_of(num_bits) -> list[Link]:
    """Return what lies between two attentions."""
    return [
        Link(weight(num_bits, HIDDEN, HIDDEN), residual=chains.GIVEN),
        Link(weight(num_bits, 2 * INNER, HIDDEN), Norm(gains(), EPS), gated=True),
        Link(weight(num_bits, HIDDEN, INNER), residual=2, wanted=True),
        Link(weight(num_bits, QKV, HIDDEN), Norm(gains(), EPS), wanted=True),
    ]


class Definition:
    """The links in float64, what lies between them rounded as kernels round it."""

    def __init__(self, links) -> None:
        dense = [linear_kernels.dense_weight(one.weight, driver.launch) for one in links]
        self.links, self.dense = links, [one.double() for one in dense]

    def __call__(self, x, residual):
        made: list[torch.Tensor] = []
        for link, dense in zip(self.links, self.dense, strict=True):
            x = x if link.norm is None else rms_norm(x, *link.norm)
            y = x.double() @ dense.T
            if link.gated:
                gate_and_up = y.view(1, -1, 2, 8)  # rows of gate and up in runs of 8
                y = silu_times(gate_and_up.transpose(1, 2).reshape(1, -1))
            if link.residual:
                y += [residual, *made][link.residual - 1].double()
            made.append(x := y.half())
        return [y for y, link in zip(made, self.links, strict=True) if link.wanted]


def relative(got, expected) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def inputs(seed):
    return [normal(1, HIDDEN, seed=seed + n).half().cuda() for n in range(2)]


@pytest.mark.parametrize("num_bits", [2, 3, 4])
@torch.no_grad()
def test_a_chain_is_its_products_in_float64(num_bits):
    links, card = links_of(num_bits), driver.card_of(0)
    exact = Definition(links)
    for seed in range(20):
        x, residual = inputs(seed)
        got = chains.run_chain(x, residual, links, driver.launch, card)
        assert got is not None, "it is chained"
        for y, expected in zip(got, exact(x, residual), strict=True):
            assert relative(y, expected) < 2e-3


@torch.no_grad()
def test_replays_read_what_the_chain_before_has_made():
    links, card = links_of(3), driver.card_of(0)
    exact, (x, residual) = Definition(links), inputs(0)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def twice():
        first = chains.run_chain(x, residual, links, driver.launch, card)
        assert first is not None
        return first + (chains.run_chain(first[0], first[0], links, driver.launch, card) or [])

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        twice()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        captured = twice()
    for seed in range(5):
        new = inputs(10 + seed)
        x.copy_(new[0]), residual.copy_(new[1])
        for _ in range(20):
            graph.replay()
        expected = exact(x, residual) + exact(captured[0], captured[0])
        for y, should in zip(captured, expected, strict=True):
            assert relative(y, should) < 2e-3


@pytest.mark.parametrize("priority", [0, -1])
@torch.no_grad()
def test_chains_on_two_streams_end(priority):
    """Each takes the whole card: were their blocks mixed, neither would ever have all its own."""
    links, card = links_of(3), driver.card_of(0)
    exact, streams = Definition(links), [torch.cuda.Stream(), torch.cuda.Stream(priority=priority)]
    given = [inputs(seed) for seed in (1, 5)]
    got: list[list[torch.Tensor]] = [[], []]
    torch.cuda.synchronize()
    for _ in range(200):
        for index, stream in enumerate(streams):
            x, residual = given[index]
            with torch.cuda.stream(stream):
                got[index] = chains.run_chain(x, residual, links, driver.launch, card) or []
    torch.cuda.synchronize()
    for mine, one in zip(got, given, strict=True):
        for y, expected in zip(mine, exact(*one), strict=True):
            assert relative(y, expected) < 2e-3


@torch.no_grad()
def test_a_step_is_the_same_by_chains(monkeypatch):
    layers = []
    for _ in range(3):
        around, mlp = (weight(3, QKV, HIDDEN), weight(3, HIDDEN, HIDDEN)), links_of(3)[1:3]
        layers.append(
            DecoderLayer(
                *(gains(), around[0], None, None, None),
                *(around[1], gains(), mlp[0].weight, mlp[1].weight),
            )
        )
    shape = DecoderShape(16, 4, 128, 512, EPS, 128**-0.5, torch.float16)
    table = normal(512, HIDDEN).half().cuda()
    frequencies = 1e4 ** (-torch.arange(0, 128, 2, device="cuda") / 128)
    weights = DecoderWeights(shape, table, tuple(layers), gains(), table, frequencies)
    found = []
    for chained in "01":
        monkeypatch.setenv("QTOOL_CHAINS", chained)
        ops = KernelOps(driver.launch, driver.card_of(0))
        runner = DecodeRunner(weights, ops, max_length=64)
        runner.prefill(torch.arange(9, device="cuda")[None])
        tokens = torch.arange(30, 50, device="cuda")[:, None]
        found.append(torch.stack([runner.step(token).clone() for token in tokens]))
    assert relative(found[1], found[0]) < 5e-3
