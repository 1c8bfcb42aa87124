"""pass@k: the formula against counting, the programs against what they do."""

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.sandbox.code_eval import CodeEval, pass_at_k

ADD = "def check(f):\n    assert f(1, 2) == 3\ncheck(add)"


@given(samples=st.integers(1, 9), data=st.data())
def test_pass_at_k_is_the_share_of_lucky_draws(samples, data):
    correct, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    draws = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
    share = Fraction(sum(any(draw) for draw in draws), len(draws))
    assert pass_at_k(samples, correct, k) == pytest.approx(float(share), abs=1e-15)


def test_pass_at_k_of_many_samples_is_no_overflow():
    assert pass_at_k(5000, 1, 100) == pytest.approx(0.02)
    assert pass_at_k(5000, 4950, 100) == 1.0


def test_programs_get_what_they_deserve():
    candidates = [
        "def add(a, b):\n    return a + b",
        "def add(a, b):\n    return a - b",
        "def add(a, b)\n    return a + b",
        "def add(a, b):\n    return c",
        "import sys\nsys.exit(0)",
        "def sub(a, b):\n    return a - b",
    ]
    scores, results = CodeEval().compute([ADD], [candidates], k=[1, 6, 7], timeout=20)
    passed = [outcome["passed"] for _, outcome in results[0]]
    assert passed == [True, False, False, False, False, False]
    assert [number for number, _ in results[0]] == list(range(6))
    assert scores == {"pass@1": pytest.approx(1 / 6), "pass@6": 1.0}  # pass@7 needs seven


def test_tasks_count_alike_whatever_they_are_tried():
    right, wrong = "def add(a, b):\n    return a + b", "add = None"
    references = [ADD, "assert add(2, 2) == 4", "assert add"]
    predictions = [[right, wrong], [right, right, wrong], [wrong]]
    scores, results = CodeEval().compute(references, predictions, k=[1, 2], timeout=20)
    assert scores == {"pass@1": pytest.approx((1 / 2 + 2 / 3 + 0) / 3)}
    assert [len(results[task]) for task in range(3)] == [2, 3, 1]
    assert [outcome["task_id"] for _, outcome in results[1]] == [1, 1, 1]


def test_endless_program_ends():
    scores, results = CodeEval().compute(["assert True"], [["while True: pass"]], [1], timeout=0.5)
    assert scores == {"pass@1": 0.0}
    assert "limit" in results[0][0][1]["result"]


def test_arguments_of_the_original_are_taken():
    score, _ = CodeEval().compute(
        references=["assert True"], predictions=[["x = 1"]], k=[1], num_workers=4, timeout=20.0
    )
    assert score["pass@1"] == 1.0


def test_a_task_without_its_candidates_is_a_mistake():
    with pytest.raises(ValueError, match="zip"):
        CodeEval().compute(["assert True", "assert True"], [["x = 1"]], k=[1])
