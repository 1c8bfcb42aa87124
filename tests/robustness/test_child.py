"""The harness sees what it is there to see."""

import os
import signal
import time

import pytest

from qtool.errors import DataError
from tests.robustness.child import MEMORY_BYTES, run_apart


def refuse() -> None:
    raise DataError("No file x.")


def refuse_at_length(text: str) -> None:
    raise DataError(text)


def fail() -> None:
    raise KeyError("x")


def die() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def compute() -> None:
    while True:
        pass


def fill_memory() -> int:
    return len(bytearray(MEMORY_BYTES + (1 << 28)))


@pytest.mark.parametrize("text", ["", "one\ntwo", "one\u2028two", "x" * 2001])
def test_a_refusal_that_is_no_short_line_is_a_complaint(text):
    assert run_apart(refuse_at_length, text).complaint is not None


def test_a_result_and_a_refusal_are_no_complaints():
    assert run_apart(len, "abc").value == 3
    assert run_apart(len, "abc").complaint is None
    refused = run_apart(refuse)
    assert (refused.kind, refused.text, refused.complaint) == ("refused", "No file x.", None)


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (fail, "KeyError"),
        (die, "SIGSEGV"),
        (compute, "s for more than"),  # it waits, on a machine that is busy otherwise
        (lambda: time.sleep(60), "waits for more than 3 s"),
        (fill_memory, "MemoryError"),
        (lambda: (_ for _ in ()).throw(DataError("x" * 5000)), "a message of 5000 characters"),
    ],
)
def test_anything_else_is_a_complaint(function, complaint):
    assert complaint in str(run_apart(function, seconds=1).complaint)
