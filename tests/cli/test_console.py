"""What a script or a log gets from the CLI."""

import json
import math
from dataclasses import asdict, dataclass

import pytest

from qtool.cli import console


@dataclass
class Result:
    value: float
    rows: tuple[float, ...]


def test_json_has_null_for_what_is_no_finite_number(tmp_path):
    target = tmp_path / "out.json"
    result = asdict(Result(math.nan, (1.5, math.inf)))
    console.write_json({"result": result, "nested": [{"x": -math.inf}], "words": "NaN"}, target)
    found = json.loads(target.read_text(), parse_constant=pytest.fail)
    assert found == {
        "result": {"value": None, "rows": [1.5, None]},
        "nested": [{"x": None}],
        "words": "NaN",
    }


def events(emit):
    for index in range(3):
        emit("request", {"task": "mmlu", "name": "q3", "index": index, "total": 3})
    emit("layer", {"name": "[q]", "error": 0.5, "memory": 2e9, "index": 0})


def test_a_log_gets_a_line_of_progress_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(console, "LOG_SECONDS", 0.0)
    with console.progress() as emit:
        events(emit)
    assert capsys.readouterr().err.splitlines() == [
        "mmlu of q3: 1 of 3",
        "mmlu of q3: 2 of 3",
        "mmlu of q3: 3 of 3",
        "quantize: 1  [q]  error 5.00e-01  memory 2 GB",
    ]


def test_a_warning_is_one_line_in_a_log(capsys):
    message = " ".join(["[word]"] * 40)
    with console.progress() as emit:
        emit("warning", {"message": message})
    assert capsys.readouterr().err == f"Warning: {message}\n"


def test_a_log_gets_nothing_of_what_is_quick(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 13))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    with console.progress() as emit:
        for index in range(2):
            emit("request", {"task": "mmlu", "name": "q3", "index": index, "total": 3})
        assert capsys.readouterr().err == ""
        emit("request", {"task": "mmlu", "name": "q3", "index": 2, "total": 3})
        assert capsys.readouterr().err == "mmlu of q3: 3 of 3\n"
