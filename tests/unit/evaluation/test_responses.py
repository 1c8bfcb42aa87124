"""Kept answers: they read back as they were, whatever a killed run left of its last line."""

import io
import json
import math
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qtool.evaluation.responses import ResponseStore, request_key

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


@example(answers=["\ud800 \u2028\n", (-0.0, float("nan"), 5e-324, True), float("-inf")])
@given(answers=st.lists(ANSWERS))
def test_answers_read_back_bit_for_bit(tmp_path_factory, answers):
    file = tmp_path_factory.mktemp("store") / "new" / "responses.jsonl"
    store = ResponseStore(file)
    for index, answer in enumerate(answers):
        store.add(f"k{index}", answer)
    kept = [bits(store[f"k{index}"]) for index in range(len(answers))]
    store.close(finished=False)
    again = ResponseStore(file)
    assert again.found == len(answers)
    assert [bits(again[f"k{index}"]) for index in range(len(answers))] == kept
    assert kept == [bits(answer) for answer in answers]
    again.close(finished=True)
    assert not file.exists()


@given(cut=st.integers(0, 200), answers=st.lists(ANSWERS, min_size=1, max_size=4))
def test_torn_last_line_costs_one_answer(tmp_path_factory, cut, answers):
    file = tmp_path_factory.mktemp("store") / "responses.jsonl"
    store = ResponseStore(file)
    for index, answer in enumerate(answers):
        store.add(f"k{index}", answer)
    store.close(finished=False)
    content = file.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    file.write_bytes(content[: max(last, len(content) - cut)])  # at most the last line
    torn = ResponseStore(file)
    assert torn.found >= len(answers) - 1
    torn.add("new", 0.1)
    torn.close(finished=False)
    whole = ResponseStore(file)
    assert whole["new"] == 0.1
    for index, answer in enumerate(answers[:-1]):
        assert bits(whole[f"k{index}"]) == bits(answer)
    whole.close(finished=False)


@pytest.mark.parametrize(
    "line", ["7", "null", "[[1], 2]", "[1, 2, 3]", "{}", "\x00\x00", '"ab', "[" * 99999]
)
def test_line_of_something_else_is_skipped(tmp_path, line):
    file = tmp_path / "responses.jsonl"
    file.write_text(f'["a", 1.5]\n{line}\n["b", "text"]\n')
    store = ResponseStore(file)
    assert (store["a"], store["b"], store.found) == (1.5, "text", 2)
    store.close(finished=False)


def test_file_that_is_no_text_is_no_answer(tmp_path):
    file = tmp_path / "responses.jsonl"
    file.write_bytes(b"\xff\xfe\n")
    store = ResponseStore(file)
    assert store.found == 0
    store.close(finished=True)


def test_every_answer_is_on_disk_as_soon_as_it_is_kept(tmp_path):
    file = tmp_path / "responses.jsonl"
    store = ResponseStore(file)
    store.add("k", (-1.25, True))
    assert json.loads(file.read_text().strip()) == ["k", [-1.25, True]]
    store.close(finished=False)


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("generate_until", ["", "text"], [1.5, (-1.5, True), None]),
        (
            "loglikelihood",
            [(-1.5, True), (float("-inf"), False)],
            [-1.5, (-1.5,), (True, -1.5), "a"],
        ),
        ("loglikelihood_rolling", [-1.5, 0], ["-1.5", True, (-1.5, True), None]),
    ],
)
def test_kept_answer_to_another_kind_of_request_does_not_count(kind, right, wrong):
    store = ResponseStore()
    for answer in [*right, *wrong]:
        store.add("k", answer)
        assert store.has(kind, "k") == any(answer is one for one in right), answer
    assert not store.has(kind, "other")


def test_folder_that_cannot_be_written_costs_what_would_be_kept(tmp_path):
    (tmp_path / "file").write_text("x")
    said: list[str] = []
    store = ResponseStore(tmp_path / "file/responses.jsonl", said.append)
    store.add("k", "text")
    assert store["k"] == "text"
    store.close(finished=True)
    (message,) = said
    assert "can't be kept" in message
    assert "QTOOL_CACHE" in message


def test_disk_that_fills_up_stops_the_keeping_and_nothing_else():
    said: list[str] = []
    store = ResponseStore(None, said.append)
    store._lines = io.TextIOWrapper(io.FileIO("/dev/full", "w"), line_buffering=True)
    for number in range(3):
        store.add(f"k{number}", "text")
    assert [store[f"k{number}"] for number in range(3)] == ["text"] * 3
    store.close(finished=False)
    assert len(said) == 1
    assert "No space left" in said[0]


def test_store_without_a_file_keeps_in_memory():
    store = ResponseStore()
    store.add("k", "text")
    assert "k" in store
    assert "other" not in store
    assert store["k"] == "text"
    store.close(finished=True)


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
