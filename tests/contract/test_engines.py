"""What the steps may expect of any engine, with two workers. Ray has a cluster of two nodes."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.engines import Pool, Task, Workers, engine_names, load_engine
from qtool.errors import EngineError, MethodError
from tests import engine_tasks as do
from tests.ray_cluster import two_nodes


@pytest.fixture(scope="module", params=engine_names())
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    with ExitStack() as stack:
        address = stack.enter_context(two_nodes()) if request.param == "ray" else None
        ahead = ("tests.engine_tasks",)
        workers = Workers(count=2, address=address, tries=3, modules=ahead)
        engine = load_engine(request.param)
        engine.check(workers)
        opened: Any = stack.enter_context(engine.open(workers))
        yield opened
        left = opened.map(do.squared, tasks(*range(4)))
        next(left)
    opened._start = None  # a map that an error has left begins no workers after the end
    left.close()


def tasks(*arguments: Any) -> list[Task]:
    return [Task(f"task {number}", argument) for number, argument in enumerate(arguments)]


def test_results_come_in_the_order_of_the_tasks(pool):
    assert list(pool.map(do.squared, tasks(*range(7)))) == [0, 1, 4, 9, 16, 25, 36]


def test_what_costs_most_is_begun_first(pool):
    costs = [1.0, 5.0, 2.0, 9.0]
    asked = [Task(f"task {n}", n, cost=cost) for n, cost in enumerate(costs)]
    begun = list(pool.map(do.when, asked))
    assert max(begun[3], begun[1]) <= min(begun[2], begun[0])


def test_nothing_is_mapped_to_nothing(pool):
    assert list(pool.map(do.squared, [])) == []


def test_a_task_in_place_goes_to_the_same_worker(pool):
    first, second = (list(pool.map(do.who, tasks(0, 1), in_place=True)) for _ in range(2))
    assert first == second
    assert len(set(first)) == 2


def test_results_in_place_wait_with_their_workers(pool, tmp_path: Path):
    asked = tasks(*((str(tmp_path / str(number)), 0.5 * (not number)) for number in range(6)))
    results = pool.map(do.marked, asked, in_place=True)
    next(results)  # the second worker has had time for three
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
    assert len(list(results)) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_go_there_and_back(pool, dtype):
    value = torch.arange(6, dtype=dtype).view(2, 3).T  # not contiguous
    (found,) = pool.map(do.twice, tasks(value))
    assert found.dtype == dtype
    assert torch.equal(found, 2 * value)
    assert torch.equal(found.add_(1), 2 * value + 1), "it is ours to change"


def test_a_tensor_without_values_stays_one(pool):
    value = torch.empty(2, 3, dtype=torch.float16, device="meta")  # of a model's outline
    assert list(pool.map(do.device_of, tasks(value))) == [("meta", torch.float16, (2, 3))]


def test_a_shared_value_is_seen_by_all(pool):
    with pool.share(torch.ones(3, 2, dtype=torch.bfloat16)) as shared:
        found = list(pool.map(do.summed, tasks(shared, shared, shared)))
    assert found == [(6.0, torch.bfloat16, (3, 2))] * 3


def test_an_error_of_the_work_ends_the_map_as_it_is(pool):
    with pytest.raises(MethodError, match=r"^q_proj is refused\.$") as caught:
        list(pool.map(do.refused, tasks("q_proj")))
    assert caught.value.layer == "q_proj"
    assert list(pool.map(do.squared, tasks(3))) == [9]


@pytest.mark.parametrize("function", [do.killed_at_first, do.full_at_first])
def test_what_befalls_one_worker_is_done_again(pool, function, tmp_path: Path):
    markers = [str(tmp_path / name) for name in "ab"]
    first, second = pool.map(function, tasks(*markers))
    assert first == second


@pytest.mark.parametrize("function", [do.always_killed, do.full])
def test_what_befalls_every_worker_ends_in_a_sentence_about_the_task(pool, function):
    with pytest.raises(EngineError, match=r"task 0.* 3 times, at last .*--resume"):
        list(pool.map(function, tasks("x")))
    assert list(pool.map(do.squared, tasks(3))) == [9]


def test_a_map_that_nobody_goes_on_with_is_given_up(pool):
    results = pool.map(do.squared, tasks(*range(20)))
    assert next(results) == 0
    results.close()
    assert list(pool.map(do.squared, tasks(5))) == [25]
