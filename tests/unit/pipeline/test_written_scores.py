"""Scores of what was written: what is equal is perfect, and any of the references will do."""

import json

import pytest
import torch

from qtool.modeling.load import load_model, load_tokenizer
from qtool.modeling.locate import Location
from qtool.pipeline.learned_data import _pieces
from qtool.pipeline.written_scores import (
    Question,
    read_questions,
    score_answers,
    write_answers,
)
from qtool.steps.adapt_model import AdaptOptions

pytest.importorskip("sacrebleu")
QUESTIONS = [
    Question("a", ("the cat sat on the mat today", "a cat was sitting on a mat"), is_chat=False),
    Question("b", ("it rained all day in the north of the country",), is_chat=False),
]


def test_an_answer_that_is_any_reference_is_perfect():
    answers = ["a cat was sitting on a mat", "it rained all day in the north of the country"]
    found = score_answers(answers, QUESTIONS, 20)
    assert found.bleu == pytest.approx(100)
    assert (found.rouge1, found.rouge2, found.rouge_l) == pytest.approx((100, 100, 100))
    assert (found.prompts, found.references, found.written_tokens) == (2, 3, 20)
    assert found.nist is not None
    assert found.nist > 1


def test_half_an_answer_is_worth_less_and_nonsense_nothing():
    half = score_answers(["a cat was", "it rained all day in the north"], QUESTIONS, 9)
    assert 10 < half.bleu < 90
    nothing = score_answers(["x", ""], QUESTIONS, 1)
    assert nothing.bleu == nothing.rouge1 == nothing.rouge_l == 0


def other_ends(loaded, told):
    """Return a model whose configuration names other ends than its tokenizer."""
    loaded.model.generation_config.eos_token_id = told
    return loaded


@pytest.mark.parametrize(("told", "end"), [(2, 2), ([5, 2], 2), (5, 5), ([5, 7], 5), (None, 2)])
def test_what_is_learned_ends_where_writing_ends(told, end, llama, tmp_path):
    loaded = other_ends(load_model(Location(llama)), told)
    assert loaded.tokenizer.eos_token_id == 2
    rows = [{"prompt": "w3 w4", "completion": " w6"}, {"text": "w3 w4"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pieces = _pieces(path, loaded, AdaptOptions().max_length)
    assert {(int(one.tokens[-1]), int(one.labels[-1])) for one in pieces} == {(end, end)}
    assert end in loaded.stop_ids


@pytest.mark.parametrize(("told", "ends"), [(None, {2}), (9, {9}), ([9, 4], {9, 4})])
def test_answers_end_at_any_end_and_are_counted_with_it(told, ends, llama):
    loaded = other_ends(load_model(Location(llama)), told)
    first = min(ends)
    written = torch.tensor([[11, first, 2, 2], [12, 13, 14, 15]])

    def generate(ids, **how):
        assert set(how["eos_token_id"]) == ends
        return torch.cat([ids.cpu(), written], dim=1)

    loaded.model.generate = generate
    questions = [Question("w3", ("w4",), is_chat=False)] * 2
    answers, count = write_answers(loaded, questions, 4, lambda _: None)
    assert answers[1] == "w12 w13 w14 w15"
    assert answers[0].split()[0] == "w11"
    assert count == 6


def test_a_chat_is_compared_with_what_was_said_without_the_end_of_its_turn(chat_llama, tmp_path):
    said = "w5 w6 w7 w8 w9"
    turns = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": said}]
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": turns}) + "\n")
    (question,) = read_questions(file, load_tokenizer(chat_llama))
    assert question.references == (said,)
    assert score_answers([said], [question], 5).bleu == pytest.approx(100)
