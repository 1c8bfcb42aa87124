"""Processes that train together learn what one learns that takes a batch in as many parts."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import distributed

from qtool import pipeline
from qtool.checkpoint.reader import CheckpointReader
from qtool.modeling.locate import Location
from qtool.pipeline.train import train
from qtool.pipeline.train_request import TrainRequest
from qtool.recipe.load import recipe_from_mapping
from qtool.steps.train_model import TrainOptions
from qtool.training import together
from tests import families
from tests.helpers import QUICK_BCQ, free_port

WEIGHTS = {
    "weights": {
        "method": "bcq",
        "options": QUICK_BCQ,
        "scheme": {"num_bits": 2, "group_size": 32},
    }
}


def _request(
    base: Path, original: Path, data: Path, out_dir: Path, accumulate: int
) -> TrainRequest:
    options = TrainOptions(
        steps=4, batch_size=4, checks=2, learning_rate=0.01, accumulate=accumulate
    )
    return TrainRequest(
        model=Location(base),
        original=Location(original),
        data=data,
        out_dir=out_dir,
        recipe="teacher-intervention",
        options=options,
    )


def _fellow(rank: int, port: int, request: TrainRequest) -> None:
    import os

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": "2",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    train(request)


def test_two_processes_learn_what_one_learns_in_two_parts(llama, tmp_path):
    data = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": families.text(12, seed)}) for seed in range(20)]
    data.write_text("\n".join(lines) + "\n")
    base = tmp_path / "w2"
    pipeline.quantize(Location(llama), base, recipe_from_mapping(WEIGHTS))
    port = free_port()
    both = _request(base, llama, data, tmp_path / "both", 1)
    context = multiprocessing.get_context("fork")
    fellows = [context.Process(target=_fellow, args=(rank, port, both)) for rank in range(2)]
    for fellow in fellows:
        fellow.start()
    one = train(_request(base, llama, data, tmp_path / "one", 2))
    for fellow in fellows:
        fellow.join(300)
        assert fellow.exitcode == 0
    written = [CheckpointReader(tmp_path / name) for name in ("both", "one")]
    assert one.best_loss < one.first_loss
    for name in written[0].names():
        first, second = (reader.load(name) for reader in written)
        if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
            assert isinstance(first, torch.Tensor)
            assert isinstance(second, torch.Tensor)
            assert torch.allclose(first, second, rtol=1e-3, atol=1e-5)
            continue
        for part, value in first.parts.items():
            other = second.parts[part]
            if value.is_floating_point():
                assert torch.allclose(value.float(), other.float(), rtol=2e-3, atol=1e-4), part
            else:
                assert (value != other).float().mean() < 0.01, part


@pytest.mark.parametrize("total", [4, 5])
def test_own_samples_are_all_samples_once(total, monkeypatch):
    seen: list[int] = []
    for rank in range(2):
        monkeypatch.setattr(together, "fellows", lambda: 2)
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        own = together.own_samples(total)
        seen += range(total)[own]
    assert seen == list(range(total))
