"""Killed at any file-system event, `--resume` ends in the same bytes, and nothing good is lost."""

import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.robustness.killing import Answer, Request, contents, server

OLD_BITS = 3

Run = Callable[[Request], Answer]


class Scenario(NamedTuple):
    method: str
    sharded: bool
    old: bool
    """Whether a checkpoint is there that is replaced."""
    mode: str
    cache: str = "memory"


SCENARIOS = [
    Scenario("rtn", False, False, "beside"),
    Scenario("rtn", False, True, "beside"),
    Scenario("rtn", True, True, "renames"),
    Scenario("rtn", True, True, "inside"),
    Scenario("rtn", False, False, "inside"),
    Scenario("gptq", True, True, "beside", "disk"),
    Scenario("gptq", False, False, "beside"),
    Scenario("bcq", True, False, "beside"),
    Scenario("bcq", False, True, "inside", "disk"),
    Scenario("bcq", False, True, "renames"),
]


@pytest.fixture(scope="module")
def run(llama, text_file, tmp_path_factory) -> Iterator[Run]:
    """Return a function that runs `quantize` in a process of its own."""
    warm = Scenario("bcq", sharded=False, old=False, mode="beside")
    out_dir = tmp_path_factory.mktemp("warm") / "out"
    with server(request_of(warm, llama, text_file, out_dir)) as ask:
        yield lambda request: ask(request)[0]


def request_of(scenario: Scenario, model: Path, text: Path, out_dir: Path) -> Request:
    return Request(
        model=str(model),
        out_dir=str(out_dir),
        text=str(text),
        method=scenario.method,
        overwrite=scenario.old,
        sharded=scenario.sharded,
        mode=scenario.mode,
        cache=scenario.cache,
    )


def lay_out(scenario: Scenario, out_dir: Path, old: Path) -> None:
    """Make what is there before the run."""
    out_dir.parent.mkdir()
    if scenario.old:
        shutil.copytree(old, out_dir)
    elif scenario.mode == "inside":
        out_dir.mkdir()


def check_left(out_dir: Path, scenario: Scenario, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Check that what has a config.json at OUT_DIR is the old checkpoint or the new one, whole."""
    found = {
        path: content
        for path, content in contents(out_dir).items()
        if path != "job.json" and not path.startswith((".partial/", "layers/"))
    }
    if "config.json" in found:
        assert found in ((old, new) if scenario.old else (new,))
    elif scenario.mode == "inside":
        return  # nothing takes it for a checkpoint; --resume makes it one
    else:
        assert not out_dir.exists() or (scenario.mode == "inside" and not found)
        if scenario.old:  # only where names can't be exchanged, between two renames
            assert scenario.mode == "renames"
            (aside,) = out_dir.parent.glob("out.replaced-*")
            assert contents(aside) == old


def kill_and_resume(
    run: Run, scenario: Scenario, points: int, model: Path, text: Path, tmp_path: Path
) -> int:
    """Kill at points that are spread over all events, each time resume, compare; count the kills.

    At every second point the resumed run is killed as well.
    """
    before, fresh = tmp_path / "before" / "out", tmp_path / "fresh" / "out"
    first = replace(
        request_of(Scenario("rtn", False, False, "beside"), model, text, before), num_bits=OLD_BITS
    )
    before.parent.mkdir()
    assert run(first)[0] == 0
    lay_out(scenario, fresh, before)
    status, events, message = run(request_of(scenario, model, text, fresh))
    assert status == 0, message
    old, new = contents(before), contents(fresh)
    kills = 0
    for index in range(points):
        out_dir = tmp_path / f"kill{index}" / "out"
        lay_out(scenario, out_dir, before)
        request = request_of(scenario, model, text, out_dir)
        # From the end: most of what is special happens there.
        point = events - round(index * (events - 1) / max(points - 1, 1))
        die_ats = [point, *([1 + 7 * point % events] if index % 2 else [])]
        for number, die_at in enumerate(die_ats):
            status, _, message = run(replace(request, die_at=die_at, resume=number > 0))
            assert status in (-9, 0), message  # 0: the second run had fewer events left
            kills += status == -9
            check_left(out_dir, scenario, old, new)
        status, _, message = run(replace(request, resume=True))
        assert status == 0, f"event {point} of {events}: {message}"
        assert contents(out_dir) == new, point
        assert [path.name for path in out_dir.parent.iterdir()] == ["out"], point
        shutil.rmtree(out_dir.parent)
    return kills


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: "-".join(map(str, s)))
def test_run_killed_at_any_point_resumes_to_the_same_bytes(
    run, llama, text_file, tmp_path, scenario
):
    assert kill_and_resume(run, scenario, 4, llama, text_file, tmp_path) >= 4


ALL = [
    Scenario(method, sharded, old, mode, cache)
    for method, sharded, old, mode, cache in itertools.product(
        ("rtn", "gptq", "bcq"),
        (False, True),
        (False, True),
        ("beside", "renames", "inside"),
        ("memory", "disk"),
    )
    if (old or mode != "renames") and (method != "rtn" or cache == "memory")
]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ALL, ids=lambda s: "-".join(map(str, s)))
def test_many_kills(run, llama, text_file, tmp_path, record_property, scenario):
    kills = kill_and_resume(run, scenario, 8, llama, text_file, tmp_path)
    record_property("kills", kills)  # --junitxml adds them up
    assert kills >= 8
