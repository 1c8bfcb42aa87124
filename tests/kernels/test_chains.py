"""Products of a chain, all blocks at once, against the same products one by one."""

import pytest
import torch
from torch import Tensor

from qtool.runtime.backends.cuda import chains, fusing, linear_kernels
from qtool.runtime.backends.cuda.chains import Link
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.launch import Card
from qtool.runtime.decode.ops import Norm
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
