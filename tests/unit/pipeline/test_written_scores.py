"""Scores of what was written: what is equal is perfect, and any of the references will do."""

import pytest

from qtool.pipeline.written_scores import Question, score_answers

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
