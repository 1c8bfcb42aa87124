"""Kept answers: they read back as they were."""

import math
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qtool.evaluation.kept import Answers, request_key
from qtool.storage.store import Store

NUMBERS = st.floats() | st.integers(-(2**63), 2**63)
TEXTS = st.text(st.characters())  # with surrogates and line separators
ANSWERS = NUMBERS | st.booleans() | TEXTS | st.lists(NUMBERS | st.booleans()).map(tuple)


def bits(value: object) -> object:
    """Return what tells every two answers apart: 0.0 from -0.0, True from 1."""
    if isinstance(value, tuple):
        return tuple(bits(one) for one in value)
    if isinstance(value, float):
        return "nan" if math.isnan(value) else struct.pack("d", value)
    return type(value), value


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@example(answers=["\ud800 \u2028\n", (-0.0, float("nan"), 5e-324, True), float("-inf")])
@given(answers=st.lists(ANSWERS))
def test_answers_read_back_bit_for_bit(answers):
    with Store() as store:
        store.clear(["answers"])
        first = Answers(store, "task")
        for index, answer in enumerate(answers):
            first.add(b"%d" % index, answer)
    kept = [bits(first[b"%d" % index]) for index in range(len(answers))]
    with Store() as store:
        again = Answers(store, "task")
        assert [bits(again[b"%d" % index]) for index in range(len(answers))] == kept
        assert kept == [bits(answer) for answer in answers]
        assert b"0" not in Answers(store, "other")


def test_every_answer_is_on_disk_as_soon_as_it_is_kept():
    with Store() as store:
        Answers(store, "task").add(b"k", (-1.25, True))
        with Store() as other:
            assert Answers(other, "task")[b"k"] == (-1.25, True)


def test_folder_that_cannot_be_written_costs_what_would_be_kept(cache):
    cache.write_text("x")
    said: list[str] = []
    with Store() as store:
        answers = Answers(store, "task", said.append)
        for number in range(3):
            answers.add(b"%d" % number, "text")
        assert [answers[b"%d" % number] for number in range(3)] == ["text"] * 3
    (message,) = said
    assert "can't be kept" in message
    assert "QTOOL_CACHE" in message


def test_answers_without_a_store_are_kept_in_memory():
    answers = Answers()
    answers.add(b"k", "text")
    assert b"k" in answers
    assert b"other" not in answers
    assert answers[b"k"] == "text"


@example(first=["\ud800"], second=["\udfff"])
@given(first=st.lists(TEXTS, max_size=3), second=st.lists(TEXTS, max_size=3))
def test_key_tells_requests_apart(first, second):
    keys = request_key("loglikelihood", first), request_key("loglikelihood", second)
    assert (keys[0] == keys[1]) == (first == second)
    assert request_key("generate_until", first) != keys[0]
    assert request_key("loglikelihood", tuple(first)) == keys[0]


def test_key_does_not_depend_on_the_order_of_settings():
    first = request_key("generate_until", ("w3", {"until": ["a"], "do_sample": False}))
    assert first == request_key("generate_until", ("w3", {"do_sample": False, "until": ["a"]}))
    assert first != request_key("generate_until", ("w3", {"do_sample": True, "until": ["a"]}))
