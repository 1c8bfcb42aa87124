"""Packing changes nothing but the number of rows; models that can't have it are refused."""

import pytest
import torch

from qtool.data.exercises import NOT_LEARNED, Learned, in_packed_rows
from qtool.errors import DataError
from qtool.steps.adapt_model import check_packing
from qtool.training.adapting import Curriculum, Pupil, learning_of
from tests import families

CPU = torch.device("cpu")


def exercises(count: int) -> list[Learned]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        tokens = torch.randint(3, 96, (4 + number % 5,), generator=generator)
        found.append(
            Learned(tokens, torch.where(torch.arange(len(tokens)) < 2, NOT_LEARNED, tokens))
        )
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "qwen3"])
def test_packed_rows_have_the_loss_of_their_exercises(family):
    model = families.build(family).float()
    pupil = Pupil(model, [model.get_input_embeddings().weight])
    pieces = exercises(10)
    alone = Curriculum(pieces, pieces, batch=4)
    together = in_packed_rows(pieces, 20)
    assert len(together) < len(pieces) / 2
    rows = Curriculum(together, together, batch=2, is_packed=True)
    expected = learning_of(pupil, alone).held_out()
    assert learning_of(pupil, rows).held_out() == pytest.approx(expected, rel=1e-4)
    check_packing(pupil, rows, CPU)


def test_a_model_that_mixes_exercises_is_refused():
    model = families.build("llama").float()

    class Blind(torch.nn.Module):
        dtype = torch.float32

        def forward(self, tokens, **_others):
            return model(tokens, use_cache=False)

    rows = Curriculum(in_packed_rows(exercises(6), 20), (), batch=2, is_packed=True)
    pupil = Pupil(Blind(), ())
    with pytest.raises(DataError, match=r"can't be packed for this model.*Leave out --packing"):
        check_packing(pupil, rows, CPU)


def test_the_order_is_that_of_the_seed_wherever_it_begins():
    pieces = exercises(10)
    first, again = (Curriculum(pieces, pieces, batch=4, seed=3) for _ in range(2))
    other = Curriculum(pieces, pieces, batch=4, seed=4)
    steps = [first.of_step(step).tokens for step in range(9)]
    assert all(torch.equal(again.of_step(step).tokens, steps[step]) for step in (8, 3, 5))
    assert any(not torch.equal(other.of_step(n).tokens, steps[n]) for n in range(9))
    epoch = torch.cat(steps[:3]).tolist()
    assert {tuple(row) for row in epoch} == {
        tuple(row) for row in Curriculum(pieces, pieces, batch=10).of_step(0).tokens.tolist()
    }
