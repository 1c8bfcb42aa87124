"""What a log and a terminal are told while a command works."""

import io
import re
import time

import pytest
from rich.console import Console

from qtool.base import Notice, Progress
from qtool.cli import progress as module
from qtool.cli.progress import Step, progress

STAMP = re.compile(r"^\[\d\d:\d\d:\d\d\] ")


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose only item is the time; nothing ticks by itself."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def lines(capsys) -> list[str]:
    found = capsys.readouterr().err.splitlines()
    assert all(STAMP.match(line) for line in found)
    return [STAMP.sub("", line) for line in found]


def layer(index: int, total: int = 10) -> Progress:
    return Progress("quantize", index + 1, total, "[q]  error 5.00e-01  memory 2 GB")


def test_a_log_gets_each_phase_at_once(capsys):
    with progress() as emit:
        for name in ("opening m", "hashing"):
            emit(Progress(name))
            assert lines(capsys) == [name]


def test_a_log_gets_time_and_time_left_after_seconds_then_now_and_then(clock, capsys):
    with progress() as emit:
        emit(Progress("solving"))
        lines(capsys)
        for index in range(9):
            clock[0] += 4
            emit(layer(index))
    detail = "[q]  error 5.00e-01  memory 2 GB"
    assert lines(capsys) == [
        f"quantize: 2 of 10, 0:08 so far, about 0:32 left  {detail}",
    ]


def test_what_came_before_counting_is_not_its_work(clock, capsys):
    with progress() as emit:
        emit(Progress("comparing"))
        clock[0] += 50  # nothing is counted, and 0 of 4 says that nothing is done
        emit(Progress("merging", 0, 4))
        lines(capsys)
        clock[0] += 40
        emit(Progress("merging", 1, 4))
    assert lines(capsys) == ["merging: 1 of 4, 0:40 so far, about 2:00 left"]


def test_time_left_counts_from_when_the_work_began_not_from_its_first_result(clock):
    step = Step("solve", begun=clock[0], total=4, done=1)
    assert step.state(clock[0] + 60) == "1 of 4, 1:00 so far, about 3:00 left"
    assert (
        Step("solve", begun=0, total=4).state(5) == "0 of 4, 0:05 so far, estimating the time left"
    )
    assert Step("solve", begun=0, total=2, done=1).state(7300).endswith("about 2:01:40 left")


def test_what_is_done_has_no_time_left_and_what_begins_again_is_counted_anew(clock, capsys):
    with progress() as emit:
        for _ in range(2):
            for done in range(1, 4):
                clock[0] += 20
                emit(Progress("predictions of m", done, 3))
    assert lines(capsys) == [
        "predictions of m: 1 of 3, 0:20 so far, about 0:40 left",
        "predictions of m: 3 of 3, 1:00 so far",
        "predictions of m: 1 of 3, 0:20 so far, about 0:40 left",
        "predictions of m: 3 of 3, 1:00 so far",
    ]


def test_a_log_hears_of_a_phase_that_says_nothing(monkeypatch, capsys):
    monkeypatch.setattr(module, "FIRST_SECONDS", 0.0)
    with progress() as emit:
        emit(Progress("thinking"))
        time.sleep(1.2)
    assert re.fullmatch(r"thinking: 0:0\d so far, time left not known yet", lines(capsys)[-1])


def test_a_log_gets_nothing_of_what_is_quick(capsys):
    with progress() as emit:
        for index in range(3):
            emit(Progress("mmlu of q3", index + 1, 3))
    assert lines(capsys) == []


def test_a_warning_is_one_line_in_a_log(capsys):
    message = " ".join(["[word]"] * 40)
    with progress() as emit:
        emit(Notice(message))
    assert capsys.readouterr().err == f"Warning: {message}\n"


def test_a_terminal_gets_one_live_line(monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(module, "err", terminal)
    with progress() as emit:
        emit(Progress("opening [m]"))
        emit(layer(0))
        emit(layer(9))
    assert "opening [m]: 0:00 so far" in screen.getvalue()
    assert "quantize: 10 of 10, 0:00 so far  [q]" in screen.getvalue()


def test_an_interruption_carries_what_is_kept():
    with pytest.raises(KeyboardInterrupt, match="All is kept"), progress("All is kept."):
        raise KeyboardInterrupt


def test_a_guess_stands_until_something_is_counted(clock, capsys):
    with progress() as emit:
        emit(Progress("opening m"))
        emit.guess(100)
        emit(Progress("solving"))
        clock[0] += 6
        emit(Progress("still solving"))
        emit(layer(0))
        clock[0] += 6
        emit(layer(1))
        emit(Progress("assembling"))
    assert lines(capsys) == [
        "opening m",
        "solving, about 1:40 left by a first guess",
        "still solving, about 1:34 left by a first guess",
        "quantize: 2 of 10, 0:06 so far, about 0:24 left  [q]  error 5.00e-01  memory 2 GB",
        "assembling",
    ]


def test_a_guess_that_was_too_short_is_dropped():
    step = Step("solving", begun=0, ends=10)
    assert step.state(7) == "0:07 so far, about 0:03 left by a first guess"
    assert step.state(11) == "0:11 so far, time left not known yet"
