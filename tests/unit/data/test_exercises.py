"""What is learned of a line of JSON, and nothing else."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.data.exercises import (
    NOT_LEARNED,
    Learned,
    cut_to,
    in_packed_rows,
    owners,
    padded,
    read_exercises,
    tokenized,
)
from qtool.errors import DataError
from qtool.modeling.load import load_tokenizer

CHATS = (
    "{% for m in messages %}{{ '<s> ' + m.role[0] + ' ' if false else '<s> ' }}{{ m.content }} "
    "</s> {% endfor %}{% if add_generation_prompt %}<s> {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(llama):
    found = load_tokenizer(llama)
    found.chat_template = CHATS
    return found


@pytest.fixture
def learned(tokenizer, tmp_path):
    """Return what rows teach: all tokens, and those that are learned, as texts."""

    def read(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        exercises = read_exercises(path, tokenizer)
        found = [tokenized(tokenizer, one, tokenizer.eos_token_id) for one in exercises]
        return [
            (
                tokenizer.decode(one.tokens),
                tokenizer.decode(one.labels[one.labels != NOT_LEARNED]),
            )
            for one in found
        ]

    return read


def test_all_of_a_text_is_learned(learned):
    assert learned({"text": "w3 w4"}) == [("w3 w4 </s>", "w3 w4 </s>")]


def test_of_a_pair_the_completion_is_learned(learned):
    assert learned({"prompt": "w3 w4", "completion": " w5 w6"}) == [
        ("w3 w4 w5 w6 </s>", "w5 w6 </s>")
    ]
    assert learned({"prompt": "", "completion": "w5"}) == [("w5 </s>", "w5 </s>")]


def test_of_a_chat_the_answers_are_learned_with_their_ends(learned):
    turns = [("user", "w3"), ("assistant", "w4 w5"), ("user", "w6"), ("assistant", "w7")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    whole = "<s> w3 </s> <s> w4 w5 </s> <s> w6 </s> <s> w7 </s>"
    assert learned(chat) == [(whole, "w4 w5 </s> w7 </s>")]
    chat["messages"].append({"role": "user", "content": "w8"})  # after the last answer: nothing
    assert learned(chat) == [(whole, "w4 w5 </s> w7 </s>")]


def test_published_rows_of_nlg_are_read_as_they_are(learned):
    assert learned({"mr": "w3", "ref": "w4"})[0][1] == "w4 </s>"
    row = {"triples": [["w3", "w4", "w5"]], "lexs": ["w6", "w7 w8"], "eid": "1"}
    assert [one for _, one in learned(row)] == ["w6 </s>", "w7 w8 </s>"]


BAD = {
    "no answer": ({"messages": [{"role": "user", "content": "w3"}]}, "no turn of the assistant"),
    "no completion": ({"prompt": "w3"}, "must have it and 'completion' as strings"),
    "empty completion": ({"prompt": "w3", "completion": ""}, "the second not empty"),
    "nothing known": ({"words": "w3"}, "'text', a string, or with 'messages'"),
    "facts without texts": ({"triples": [["w3", "w4", "w5"]]}, "and 'lexs' as lists"),
    "no facts": ({"triples": None, "lexs": ["w6"]}, "and 'lexs' as lists"),
    "half a fact": ({"triples": [["w3", "w4"]], "lexs": ["w6"]}, "subject, property, object"),
    "a fact in one string": ({"triples": ["abc"], "lexs": ["w6"]}, "subject, property, object"),
    "an empty text": ({"triples": [["w3", "w4", "w5"]], "lexs": ["w6", ""]}, "each of 'lexs'"),
    "a text that isn't": ({"triples": [["w3", "w4", "w5"]], "lexs": [None]}, "each of 'lexs'"),
    "a number": ({"prompt": 3, "completion": "w4"}, "as strings"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_line_that_teaches_nothing_is_named(learned, name):
    row, said = BAD[name]
    with pytest.raises(DataError, match=r"rows\.jsonl line 1.*" + said):
        learned(row)


def test_a_template_that_rewrites_earlier_turns_is_refused(learned, tokenizer, monkeypatch):
    last = "{% for m in messages %}{% if loop.last %}<s> {% endif %}{{ m.content }} {% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", last)
    turns = [{"role": role, "content": "w3"} for role in ("user", "assistant") * 2]
    with pytest.raises(DataError, match="writes earlier turns otherwise"):
        learned({"messages": turns})


@given(st.lists(st.integers(2, 9), min_size=1, max_size=12), st.integers(9, 30))
def test_packing_keeps_all_exercises_and_the_width(sizes, length):
    pieces = [
        Learned(torch.full((n,), i + 1), torch.full((n,), i + 1)) for i, n in enumerate(sizes)
    ]
    rows = in_packed_rows(pieces, length)
    assert all(len(row.tokens) == sum(row.lengths) <= length for row in rows)
    assert sorted(n for row in rows for n in row.lengths) == sorted(sizes)
    learned = sum(int((row.labels != NOT_LEARNED).sum()) for row in rows)
    assert learned == sum(sizes) - len(sizes)  # not the first of each
    for row, found in zip(rows, owners(rows, length), strict=True):
        starts = [0, *torch.tensor(row.lengths).cumsum(0).tolist()]
        for number, (first, last) in enumerate(itertools.pairwise(starts), 1):
            assert bool((found[first:last] == number).all())
            assert len(set(row.tokens[first:last].tolist())) == 1
        assert bool((found[starts[-1] :] == 0).all())


@given(st.lists(st.lists(st.booleans(), max_size=20), max_size=5), st.integers(2, 9))
def test_cutting_and_filling_up_lose_no_label(rows, length):
    pieces = []
    for row in rows:
        tokens = torch.arange(1, len(row) + 1)
        labels = torch.where(torch.tensor(row, dtype=torch.bool), tokens, NOT_LEARNED)
        pieces.append(Learned(tokens, labels))
    cut = cut_to(pieces, length)
    assert all(0 < len(one.tokens) <= length for one in cut)
    assert all(bool((one.labels[1:] != NOT_LEARNED).any()) for one in cut)
    tokens, labels = padded(cut, length, filler=0)
    assert tokens.shape == labels.shape == (len(cut), length)
    for row, one in enumerate(cut):
        assert torch.equal(tokens[row, : len(one.tokens)], one.tokens)
        assert torch.equal(labels[row, : len(one.labels)], one.labels)
        assert bool((labels[row, len(one.labels) :] == NOT_LEARNED).all())
