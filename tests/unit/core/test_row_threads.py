"""Rows solved side by side: the same bits as one after the other, and no error gets lost."""

import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.base import LayerProblem
from qtool.core import row_threads
from qtool.core.row_threads import by_rows, num_parts
from qtool.methods.bcq import METHOD, BcqOptions
from qtool.scheme import WeightScheme


@pytest.fixture(autouse=True, scope="module")
def _parts_of_few_rows():
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_threads, "FEWEST_IN_A_PART", 96)
        yield
    torch.set_num_threads(threads)


def problem_of(rows: int, columns: int, *, calibrated: bool, **scheme) -> LayerProblem:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(4 * columns, columns, generator=generator)
    return LayerProblem(
        name="layer",
        weight=torch.randn(rows, columns, generator=generator),
        scheme=WeightScheme(num_bits=3, group_size=32, **scheme),
        statistics={"hessian": x.T @ x / len(x)} if calibrated else {},
    )


@pytest.mark.parametrize("scales", ["float16", "coded"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_threads_change_no_bit(calibrated, scales):
    problem = problem_of(301, 48, calibrated=calibrated)
    options = BcqOptions(rounds=2, iterations=1, polish_rounds=1, scales=scales)
    torch.set_num_threads(1)
    alone = METHOD.solve(problem, options).tensor
    for threads in (2, 9):
        torch.set_num_threads(threads)
        assert num_parts(problem.weight) == min(threads, 301 // row_threads.FEWEST_IN_A_PART)
        together = METHOD.solve(problem, options).tensor
        assert {name: part.shape for name, part in together.parts.items()} == {
            name: part.shape for name, part in alone.parts.items()
        }
        assert all(torch.equal(part, together.parts[name]) for name, part in alone.parts.items())


def test_groups_across_rows_stay_together():
    problem = problem_of(200, 8, calibrated=True, group_dim="out_features")
    options = BcqOptions(rounds=1, iterations=1, polish_rounds=1)
    torch.set_num_threads(1)
    alone = METHOD.solve(problem, options).tensor
    torch.set_num_threads(2)
    together = METHOD.solve(problem, options).tensor
    assert all(torch.equal(part, together.parts[name]) for name, part in alone.parts.items())


@given(rows=st.integers(1, 2000), threads=st.integers(1, 9))
def test_rows_come_back_in_order(rows, threads):
    torch.set_num_threads(threads)
    weight, other = torch.arange(2.0 * rows).view(rows, 2), torch.arange(rows)
    sums, others = by_rows(lambda part, numbers: (part.sum(1), numbers), weight, other)
    assert torch.equal(sums, weight.sum(1))
    assert torch.equal(others, other)
    assert torch.get_num_threads() == threads


def test_parts_run_at_the_same_time_and_share_the_threads():
    torch.set_num_threads(4)
    meet = threading.Barrier(4, timeout=30)

    def work(part):
        meet.wait()
        return (torch.full((len(part),), torch.get_num_threads()),)

    assert by_rows(work, torch.zeros(512, 2))[0].tolist() == [1] * 512
    assert torch.get_num_threads() == 4
    seen = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [4]


@pytest.mark.parametrize("error", [ValueError, MemoryError, KeyboardInterrupt])
def test_an_error_of_a_part_arrives(error):
    torch.set_num_threads(2)

    def work(part):
        if part[0, 0] > 0:
            raise error("of the second part")
        return (part,)

    weight = torch.zeros(256, 2)
    weight[128:] = 1
    with pytest.raises(error, match="of the second part"):
        by_rows(work, weight)
    assert torch.get_num_threads() == 2


def test_small_and_large_weights_are_one_part(monkeypatch):
    torch.set_num_threads(2)
    weight = torch.zeros(256, 4)
    assert num_parts(weight) == 2
    assert num_parts(weight[:191]) == 1
    assert num_parts(weight.to("meta")) == 1
    monkeypatch.setattr(row_threads, "MOST_IN_THREADS", 1023)
    assert num_parts(weight) == 1
    assert by_rows(lambda part: (part,), weight)[0] is weight


def test_a_weight_of_few_rows_is_solved():
    torch.set_num_threads(2)
    problem = problem_of(3, 40, calibrated=True)
    assert METHOD.solve(problem, BcqOptions(rounds=1)).tensor.shape == (3, 40)
    assert METHOD.solve(replace(problem, statistics={}), BcqOptions(rounds=1)).tensor.shape == (
        3,
        40,
    )
