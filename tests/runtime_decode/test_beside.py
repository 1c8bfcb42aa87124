"""Low-rank parts beside fused weights: as if they were in them."""

from typing import Any

import pytest
import torch

from qtool.runtime.backends.cuda.fusing import fuse
from qtool.runtime.decode.beside import LowRankBeside, LowRankOps
from qtool.runtime.decode.ops import DecodeOps
from qtool.runtime.decode.torch_ops import OPS, TorchOps
from qtool.scheme import WeightScheme
from tests.helpers import dequantized, normal
from tests.unit.training.solved import solved

SCHEME = WeightScheme(num_bits=3, group_size=32)
OPS_BESIDE = LowRankOps(OPS)


@pytest.mark.parametrize("way", ["apart", "below one another", "alternating"])
def test_gate_and_up_with_low_rank_are_those_of_their_sums(way):
    weights = [solved("binary_coding", normal(24, 96, seed=n) / 8, SCHEME) for n in (0, 1)]
    gate, up = (dequantized(weight).half() for weight in weights)
    known: dict[str, Any] = {"apart": (gate, up), "below one another": torch.cat([gate, up])}
    if way == "alternating":
        fused = fuse(weights, torch.float16, interleave=True)
        assert fused is not None
        known[way] = fused.prepared
    low, high = normal(5, 96, seed=3).half() / 8, normal(48, 5, seed=4).half() / 8
    x = normal(7, 96, seed=5).half()
    y = x.float() @ (torch.cat([gate, up]).float() + high.float() @ low.float()).T
    expected = torch.nn.functional.silu(y[:, :24]) * y[:, 24:]
    found = OPS_BESIDE.gated(x, LowRankBeside(known[way], low, high))
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    plain = OPS_BESIDE.gated(x, known[way])
    assert torch.equal(plain, OPS.gated(x, known[way]))


def test_a_residual_is_added_once():
    weight, low, high = normal(8, 6), normal(2, 6, seed=1), normal(8, 2, seed=2)
    x, residual = normal(3, 6, seed=3), normal(3, 8, seed=4)
    beside = LowRankBeside(weight, low, high)
    found = OPS_BESIDE.linear(x, beside, residual)
    torch.testing.assert_close(found, residual + x @ (weight + high @ low).T)
    torch.testing.assert_close(beside.dense(), weight + high @ low)


def test_every_operation_is_there():
    for name in (name for name in vars(DecodeOps) if not name.startswith("_")):
        assert callable(getattr(OPS_BESIDE, name)), name


class Foreseeing(TorchOps):
    """Operations that run ahead what they are given, as those of a card do."""

    def compile_ahead(self, run):
        run(OPS)


def test_what_is_beside_runs_ahead_as_well():
    ran: list[DecodeOps] = []
    LowRankOps(Foreseeing()).compile_ahead(ran.append)
    assert [type(ops) for ops in ran] == [LowRankOps]
