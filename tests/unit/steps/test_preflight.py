"""From what parts took to what the whole takes: no measuring."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.steps.preflight import BlockCosts, Phase, Preflight, solving, stretched
from qtool.steps.usage import NO_USE, MachineRoom, Meter, Usage

ROOM = MachineRoom(memory_bytes=8 * 10**9, card_bytes=0, disk_bytes=10**9)
sizes = st.integers(0, 2**40)
usages = st.builds(Usage, st.floats(0, 1e5), st.floats(0, 1e5), sizes, sizes)


def near(first: Usage, second: Usage) -> bool:
    return (
        math.isclose(first.seconds, second.seconds, rel_tol=1e-9, abs_tol=1e-9)
        and math.isclose(first.cpu_seconds, second.cpu_seconds, rel_tol=1e-9, abs_tol=1e-9)
        and first.memory_bytes == second.memory_bytes
        and first.card_bytes == second.card_bytes
    )


@given(usages, usages, usages)
def test_times_add_up_and_peaks_do_not(first, second, third):
    assert near(first + second, second + first)
    assert near((first + second) + third, first + (second + third))
    assert near(first + NO_USE, first)
    assert near(first * 2, first + first)
    assert (first + second).memory_bytes == max(first.memory_bytes, second.memory_bytes)


def test_blocks_take_what_their_layers_take_and_passing_them():
    layers = {"a": Usage(1, 2, 30, 0), "b": Usage(10, 20, 10, 0)}
    costs = BlockCosts(
        layers=layers, weights={"a": 100, "b": 1000, "c": 220}, advance=Usage(0.5, 0.5, 20, 0)
    )
    found, tuned = solving(costs, [["a", "b"], ["a"], ["a", "c"]], passed=2)
    # 3 a, 1 b, and c as long as 220 of the 1100 weights that took 11 seconds
    assert found.seconds == pytest.approx(3 * 1 + 10 + 2.2 + 2 * 0.5)
    assert found.cpu_seconds == pytest.approx(3 * 2 + 20 + 4.4 + 2 * 0.5)
    assert found.memory_bytes == 30
    assert tuned == NO_USE
    _, tuned = solving(costs, [["a"], ["a"]], passed=1, tuned=Usage(4, 5, 6, 7))
    assert tuned == Usage(8, 10, 6, 7)


@pytest.mark.parametrize("wanted", [4, 12, 400])
def test_steps_are_counted_and_looks_are_not(wanted):
    looks, step = 7.0, 0.25
    few, more = (Usage(looks + step * count, 0, 5, 0) for count in (4, 12))
    found = stretched(few, more, steps=(4, 12), wanted=wanted)
    assert found.seconds == pytest.approx(looks + step * wanted)


def test_a_phase_that_does_not_fit_says_what_to_change():
    phases = (
        Phase("open", Usage(1, 1, 10**9, 0)),
        Phase("solve blocks", Usage(60, 60, 9 * 10**9, 0), disk_bytes=10**8),
        Phase("search", None),
        Phase("write", Usage(1, 1, 10**9, 0), disk_bytes=2 * 10**9),
    )
    found = Preflight(phases, ROOM)
    blocks, disk = [shortage.sentence() for shortage in found.shortages()]
    assert blocks.startswith("'solve blocks' needs 9 GB of memory of this machine, and there are 8")
    assert "calibration.num_samples" in blocks
    assert disk.startswith("'write' needs 2 GB of free disk, and there are 1 GB: free some space")
    assert not found.is_whole
    assert found.total == Usage(62, 62, 9 * 10**9, 0)
    report = json.loads(json.dumps(found.to_json()))
    assert report["total"]["disk_bytes"] == 2 * 10**9
    assert report["phases"][1]["margins"] == {"memory": -(10**9), "disk": 9 * 10**8}
    assert "seconds" not in report["phases"][2]


def test_a_meter_sees_memory_that_is_gone_afterwards():
    meter = Meter("cpu")
    with meter.measuring("little"):
        sum(range(1000))
    for _ in range(2):
        with meter.measuring("much"):
            block = bytearray(400 * 2**20)
            block[:: 2**12] = b"x" * len(block[:: 2**12])
            del block
    with meter.measuring("after"):
        sum(range(1000))
    little, much, after = (meter.mean(name).memory_bytes for name in ("little", "much", "after"))
    assert much - little > 300 * 2**20
    assert much - after > 300 * 2**20
    assert meter.names() == {"little", "much", "after"}
