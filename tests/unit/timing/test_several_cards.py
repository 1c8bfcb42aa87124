"""Random models that ranks share, and processes started for them; on CPUs."""

import pickle

import pytest
import torch

from qtool.errors import BackendError
from qtool.runtime import spawned_ranks
from qtool.runtime.decode.parallel import ParallelOps
from qtool.runtime.decode.runner import DecodeRunner
from qtool.runtime.decode.torch_ops import OPS
from qtool.runtime.tensor_parallel import TensorParallel
from qtool.scheme import WeightScheme
from qtool.timing import synthetic, workload
from tests.runtime_decode.ranks import on_ranks
from tests.unit.timing.rig import TINY

assert TINY.decoder is not None
SIZES, CPU = TINY.decoder, torch.device("cpu")


def said(group: TensorParallel, scheme: WeightScheme | None) -> tuple[list[int], torch.Tensor]:
    weights = synthetic.random_decoder(SIZES, scheme, CPU, group)
    runner = DecodeRunner(weights, ParallelOps(OPS, group.all_reduce), max_length=16)
    logits = runner.prefill(torch.tensor([[1, 2, 3]]))
    shape = weights.shape
    return [shape.num_heads, shape.num_key_value_heads], runner.greedy(logits.argmax(-1), 4)


@pytest.mark.parametrize("scheme", [None, WeightScheme(num_bits=2, group_size=32)], ids=str)
def test_ranks_have_their_heads_and_choose_alike(scheme):
    first, second = on_ranks(said, scheme)
    half = [SIZES.num_heads // 2, SIZES.num_key_value_heads // 2]
    assert first[0] == second[0] == half
    assert torch.equal(first[1], second[1])


def test_more_cards_than_heads_are_refused():
    group = TensorParallel(0, 64, CPU)
    with pytest.raises(BackendError, match="key-value heads are too few for 64 cards"):
        synthetic.random_decoder(SIZES, None, CPU, group)


def test_models_can_be_handed_to_another_process():
    scheme = WeightScheme(num_bits=2, group_size=32)
    models = workload.synthetic_workload("tiny", TINY, scheme, None, CPU).models
    again = pickle.loads(pickle.dumps(models))
    assert [model.name for model in again] == [model.name for model in models]
    assert len(again[0].load().layers) == SIZES.num_layers


def answered(group: TensorParallel, fails: bool) -> float:
    if fails and group.rank == 1:
        raise BackendError("Rank 1 has a reason.")
    return float(group.all_reduce(torch.tensor([group.rank + 1.0])))


def test_started_ranks_answer_by_the_first(monkeypatch):
    monkeypatch.setattr(spawned_ranks, "START_METHOD", "fork")  # faster
    assert spawned_ranks.on_ranks(2, answered, False) == 3.0


def test_a_started_rank_that_fails_is_told_with_its_reason(monkeypatch):
    monkeypatch.setattr(spawned_ranks, "START_METHOD", "fork")
    with pytest.raises(BackendError, match=r"Rank \d of 2 failed: .*(reason|has ended|status)"):
        spawned_ranks.on_ranks(2, answered, True)
