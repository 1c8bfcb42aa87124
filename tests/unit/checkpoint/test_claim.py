"""Whoever holds a lock holds the directory that has the name, whatever others do meanwhile."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from qtool.checkpoint.claim import claim
from qtool.checkpoint.fresh import made_fresh
from qtool.checkpoint.many_results import held
from qtool.checkpoint.place import find_place
from qtool.errors import OutputError
from qtool.steps.unfinished_adapter import open_unfinished

Hold = Callable[[Path], AbstractContextManager[object]]
LOCK = fcntl.flock


@contextlib.contextmanager
def claimed(out_dir: Path) -> Iterator[None]:
    descriptor = claim(find_place(out_dir))
    yield
    os.close(descriptor)


@contextlib.contextmanager
def exporting(out_dir: Path) -> Iterator[None]:
    with made_fresh(out_dir) as made:
        made.touch()
        yield


def adapting(out_dir: Path) -> AbstractContextManager[object]:
    place = find_place(out_dir)
    return contextlib.closing(open_unfinished(place, {}, overwrite=False, resume=False))


HOLDERS: dict[str, tuple[Hold, str]] = {
    "a run": (claimed, "out.partial"),
    "an export": (exporting, "out.partial"),
    "a grid": (held, "out"),
    "an adapter": (adapting, "out.partial"),
}


@pytest.fixture(params=HOLDERS)
def holder(request: pytest.FixtureRequest) -> tuple[Hold, str]:
    return HOLDERS[request.param]


@pytest.fixture
def at_first_lock(monkeypatch) -> Callable[[Callable[[], None]], None]:
    """Return what has others do something just before the first lock is asked for."""

    def arrange(act: Callable[[], None]) -> None:
        waiting = [act]

        def lock(descriptor: int, kind: int) -> None:
            if waiting:
                waiting.pop()()
            LOCK(descriptor, kind)

        monkeypatch.setattr(fcntl, "flock", lock)

    return arrange


def is_locked(directory: Path) -> bool:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        LOCK(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def test_a_directory_that_another_removes_in_between_is_made_anew(holder, at_first_lock, tmp_path):
    hold, name = holder
    at_first_lock((tmp_path / name).rmdir)
    with hold(tmp_path / "out"):
        assert is_locked(tmp_path / name)


def test_a_directory_that_another_makes_anew_in_between_is_the_others(
    holder, at_first_lock, tmp_path, monkeypatch
):
    monkeypatch.setattr("qtool.checkpoint.claim.PATIENCE", 2)
    hold, name = holder
    others: list[int] = []

    def replace() -> None:
        (tmp_path / name).rename(tmp_path / "elsewhere")
        (tmp_path / name).mkdir()
        others.append(os.open(tmp_path / name, os.O_RDONLY))
        LOCK(others[0], fcntl.LOCK_EX)

    at_first_lock(replace)
    with pytest.raises(OutputError, match="Another run is writing"), hold(tmp_path / "out"):
        pytest.fail("two at once")
    assert is_locked(tmp_path / name)
    os.close(others[0])


def test_a_holder_that_gave_its_directory_away_does_not_remove_the_next_ones(tmp_path):
    work, place = tmp_path / "out.partial", find_place(tmp_path / "out")
    first = open_unfinished(place, {}, overwrite=False, resume=False)
    work.rename(tmp_path / "out")
    work.mkdir()
    first.close()
    assert work.is_dir()
