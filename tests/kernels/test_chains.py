"""Products of a chain, all blocks at once, against the same products one by one, and in a step."""

import pytest
import torch
from torch import Tensor

from qtool.runtime.backends.cuda import chains, fusing, linear_kernels
from qtool.runtime.backends.cuda.chains import Link
from qtool.runtime.backends.cuda.decode_ops import KernelOps
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.launch import Card
from qtool.runtime.decode.ops import Norm
from qtool.runtime.decode.runner import DecodeRunner
from qtool.runtime.decode.weights import DecoderLayer, DecoderShape, DecoderWeights
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import normal
from tests.kernels.host import Recorder

CARD = Card(2, 227 * 1024)
HIDDEN, INNER, HEADS = 272, 328, 160
EPS = 1e-5


def scaled_tensor(scheme, rows, inputs, seed):
    tensor = random_tensor("binary_coding", scheme, Shape2D(rows, inputs), seed)
    for part in tensor.parts.values():
        if part.is_floating_point():
            part /= inputs**0.5
    return tensor


def weight_of(scheme, rows, inputs, dtype, seed) -> KernelWeight:
    return linear_kernels.prepare(scaled_tensor(scheme, rows, inputs, seed), dtype)


def gate_and_up(scheme, dtype) -> KernelWeight:
    pair = [scaled_tensor(scheme, INNER, HIDDEN, seed) for seed in (5, 6)]
    fused = fusing.fuse(pair, dtype, interleave=True)
    assert fused is not None
    return fused.prepared


def block_of(scheme, dtype) -> list[Link]:
    """Return what lies between two attentions."""
    gains = [(1 + normal(HIDDEN) / 8).to(dtype) for _ in range(2)]
    return [
        Link(weight_of(scheme, HIDDEN, HEADS, dtype, 1), residual=chains.GIVEN),
        Link(gate_and_up(scheme, dtype), Norm(gains[0], EPS), gated=True),
        Link(weight_of(scheme, HIDDEN, INNER, dtype, 2), residual=2, wanted=True),
        Link(weight_of(scheme, 200, HIDDEN, dtype, 3), Norm(gains[1], EPS), wanted=True),
    ]


def one_by_one(x, residual, links, launch):
    made: list[Tensor] = []
    for link in links:
        added = [None, residual, *made][link.residual]
        where, norm = (launch, CARD), link.norm
        x = linear_kernels.matmul(
            x, link.weight, *where, residual=added, gated=link.gated, norm=norm, kernel="planes"
        )
        made.append(x)
    return [y for y, link in zip(made, links, strict=True) if link.wanted]


@pytest.mark.parametrize(
    ("dtype", "count", "times"), [(torch.float16, 4, 2), (torch.bfloat16, 3, 1)]
)
def test_a_chain_makes_what_its_products_make(dtype, count, times):
    links = block_of(WeightScheme(num_bits=3, group_size=64), dtype)
    launch = Recorder()
    for _ in range(times):  # the words of one launch are no other's
        x, residual = normal(1, HEADS).to(dtype), normal(1, HIDDEN).to(dtype)
        got = chains.run_chain(x, residual, links[:count], launch, CARD)
        assert got is not None
        assert launch.names[-1] == "bit_plane_chain"
        expected = one_by_one(x, residual, links[:count], Recorder())
        for made, should in zip(got, expected, strict=True):
            torch.testing.assert_close(made, should, rtol=2e-2, atol=2e-2)


HEAD_DIM, VOCABULARY = 64, 96


def decoder(scheme, dtype=torch.float16) -> DecoderWeights:
    """Return two blocks, of two heads that share their keys."""
    layers = []
    for _ in range(2):
        gains = [(1 + normal(HIDDEN) / 8).to(dtype) for _ in range(2)]
        qkv, output = (4 * HEAD_DIM, HIDDEN), (HIDDEN, 2 * HEAD_DIM)
        projections = [weight_of(scheme, *shape, dtype, 7) for shape in (qkv, output)]
        mlp = (gate_and_up(scheme, dtype), weight_of(scheme, HIDDEN, INNER, dtype, 8))
        layers.append(
            DecoderLayer(gains[0], projections[0], None, None, None, projections[1], gains[1], *mlp)
        )
    shape = DecoderShape(2, 1, HEAD_DIM, VOCABULARY, EPS, HEAD_DIM**-0.5, dtype)
    embedding, final = normal(VOCABULARY, HIDDEN).to(dtype), torch.ones(HIDDEN, dtype=dtype)
    frequencies = 1e4 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return DecoderWeights(shape, embedding, tuple(layers), final, embedding, frequencies)


def logits_of_steps(weights, launch, tokens) -> Tensor:
    """Return the logits of tokens one after another, (tokens, vocabulary)."""
    runner = DecodeRunner(weights, KernelOps(launch, CARD), max_length=16)
    made = [runner.prefill(torch.tensor([[3, 5]])).clone()]
    made += [runner.step(torch.tensor([token])).clone() for token in tokens]
    return torch.cat(made)


def test_a_step_of_decoding_is_the_same_by_chains(monkeypatch):
    weights = decoder(WeightScheme(num_bits=2, group_size=64))
    each, chained = Recorder(), Recorder()
    monkeypatch.setenv("QTOOL_CHAINS", "0")
    expected = logits_of_steps(weights, each, (7, 11))
    monkeypatch.setenv("QTOOL_CHAINS", "1")
    got = logits_of_steps(weights, chained, (7, 11))
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2 * float(expected.std()))
    assert "bit_plane_chain" not in each.names
    assert chained.names.count("bit_plane_chain") == 2 * len(weights.layers)
    assert len(chained.names) == len(each.names) - 2 * (4 + 3 - 2), "7 products of a step are 2"


@pytest.mark.parametrize("missing", ["a weight of other bits", "room", "whole words of a group"])
def test_what_cannot_be_chained_runs_one_by_one(missing):
    scheme = WeightScheme(num_bits=3, group_size=32 if "group" in missing else 64)
    links, card = block_of(scheme, torch.float16), CARD
    if "bits" in missing:
        other = weight_of(WeightScheme(num_bits=2, group_size=64), HIDDEN, INNER, torch.float16, 2)
        links[2] = links[2]._replace(weight=other)
    if missing == "room":
        card = Card(2, 48 * 1024)
    x, residual, launch = normal(1, HEADS).half(), normal(1, HIDDEN).half(), Recorder()
    assert chains.run_chain(x, residual, links, launch, card) is None
    assert launch.names == []
