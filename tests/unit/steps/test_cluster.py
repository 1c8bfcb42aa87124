"""A run on paper: what its tasks take on machines that aren't there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.steps.cluster import BlockWork, Cluster, ClusterWork, InputGroup, forecast
from qtool.wording import gigabytes

PAGE = Path(__file__).parents[3] / "docs" / "several-machines.md"
HERE = Cluster(nodes=1, workers=1, memory_bytes=10**12, network=1e9)
GROUP = InputGroup(
    name="q_proj",
    in_features=64,
    residual=0,
    measuring=8.0,
    parts=((32, 3.0), (32, 3.0), (16, 1.0)),
)
BLOCK = BlockWork(count=2, stored_bytes=1000, walked_bytes=4000, advance=4.0, groups=(GROUP,))
WORK = ClusterWork(
    blocks=(BLOCK,),
    tables=(5.0,),
    before=1.0,
    after=2.0,
    chunks=8,
    prefix="linears",
    streams_bytes=10**6,
    base_bytes=0,
    copying=float("inf"),
    adding=float("inf"),
)


def seconds(work: ClusterWork, **there: Any) -> dict[str, float]:
    found = forecast(work, replace(HERE, **there))
    return {phase.name: phase.seconds for phase in found.phases}


def test_one_worker_does_one_thing_after_the_other():
    names = ("before", "pass blocks", "measure", "solve", "solve tables", "write")
    assert seconds(WORK) == dict(zip(names, (1.0, 8.0, 16.0, 14.0, 5.0, 2.0), strict=True))


@pytest.mark.parametrize(
    ("workers", "measure", "solve"), [(2, 8.0, 8.0), (3, 6.0, 6.0), (8, 2.0, 6.0), (20, 2.0, 6.0)]
)
def test_chunks_and_parts_are_what_workers_share(workers, measure, solve):
    found = seconds(WORK, workers=workers)
    assert (found["measure"], found["solve"]) == (measure, solve)


def test_with_whole_blocks_all_linears_are_solved_at_once():
    two = replace(BLOCK, count=1, groups=(replace(GROUP, parts=((32, 3.0),)),) * 2)
    work = replace(WORK, blocks=(two,))
    assert seconds(work, workers=2)["solve"] == 6.0
    assert seconds(replace(work, prefix="block"), workers=2)["solve"] == 3.0


@given(st.integers(1, 40), st.integers(1, 12), st.floats(0, 50), st.floats(0, 50))
def test_workers_take_at_least_their_share_and_at_most_all(workers, chunks, measuring, solving):
    group = replace(GROUP, measuring=measuring, parts=((8, solving),) * 5)
    work = replace(WORK, chunks=chunks, blocks=(replace(BLOCK, groups=(group,)),))
    found = forecast(work, replace(HERE, workers=workers))
    assert found.one_worker / workers - 1e-6 <= found.seconds <= found.one_worker + 1e-6


def test_a_slow_network_is_paid_for_sums_and_a_single_node_has_none():
    slow = seconds(WORK, nodes=2, workers=2, network=float(GROUP.sums_bytes))
    assert slow["measure"] >= 2 * 8 * 1.0  # two blocks, eight chunks, a second each
    assert seconds(WORK, workers=2, network=1.0)["measure"] == 8.0


def test_what_will_not_fit_is_said():
    small = forecast(WORK, replace(HERE, workers=4, memory_bytes=1000))
    (shortage,) = small.shortages()
    assert "memory of a node" in shortage.sentence()
    assert "fewer workers on a node" in shortage.sentence()
    assert not list(forecast(WORK, HERE).shortages())


def test_the_page_says_what_the_sums_of_405_billion_parameters_take():
    text = PAGE.read_text()
    hidden, inner = 16384, 53248
    for name, inputs, residual in (("q_proj", hidden, 0), ("down_proj", inner, hidden)):
        group = replace(GROUP, in_features=inputs, residual=residual, parts=((1024, 1.0),))
        assert f"| sums of one chunk for `{name}` | {gigabytes(group.sums_bytes)} |" in text
        work = replace(WORK, blocks=(replace(BLOCK, groups=(group,)),))
        found = forecast(work, HERE)
        assert f"| the command, for `{name}` | {gigabytes(found.driver_bytes)} |" in text
        assert f"| solving a part of `{name}` | {gigabytes(group.solving_bytes)} |" in text
