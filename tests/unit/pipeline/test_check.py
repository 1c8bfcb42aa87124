"""The check at the end of `quantize`: measured, told, and never in the way of what is finished."""

import json
import sys
import weakref
from dataclasses import replace
from typing import Any

import pytest

from qtool import pipeline
from qtool.checkpoint.marks import REPORT_NAME
from qtool.errors import ModelError
from qtool.evaluation.agreement import Agreement
from qtool.evaluation.closeness import Closeness
from qtool.modeling import load as load_module
from qtool.modeling.locate import Location
from qtool.pipeline.check import warnings_of
from tests.helpers import recipe, steps_in, warnings_in

checking: Any = sys.modules["qtool.pipeline.check"]
AGREEMENT = Agreement(
    kl_divergence=0.1,
    kl_standard_error=0.01,
    kl_p99=1.0,
    top1_agreement=0.9,
    top1_standard_error=0.01,
    positions=100,
    dataset="text",
    context_length=64,
    greedy=(),
    greedy_equal_share=None,
)


@pytest.fixture
def calibrated(text_file):
    section = {"dataset": str(text_file), "num_samples": 6, "sequence_length": 64}
    return recipe("gptq", 3, calibration=section)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(checking, "WINDOWS", (2, 40))


def close(text: float, chats: float | None) -> Closeness:
    measured = None if chats is None else replace(AGREEMENT, kl_divergence=chats)
    return Closeness(replace(AGREEMENT, kl_divergence=text), measured)


@pytest.mark.usefixtures("small")
def test_result_is_compared_and_the_report_is_as_without(chat_llama, tmp_path, calibrated):
    events: list[Any] = []
    plain = pipeline.quantize(Location(chat_llama), tmp_path / "plain", calibrated)
    result = pipeline.quantize(
        Location(chat_llama), tmp_path / "out", calibrated, check=True, emit=events.append
    )
    assert plain.check is None
    assert result.check is not None
    for found in (result.check.text, result.check.chats):
        assert found is not None
        assert found.positions == 2 * 39
        assert found.kl_divergence > 1e-4
    for text in ("wikitext2-test", "dialogues-test"):
        assert len(steps_in(events, f"predictions of out on {text}")) == 3
    keys = [json.loads((tmp_path / name / REPORT_NAME).read_text()) for name in ("plain", "out")]
    assert list(keys[0]) == list(keys[1])


@pytest.mark.usefixtures("small")
def test_two_models_are_never_there_at_once(chat_llama, tmp_path, calibrated, monkeypatch):
    alive: list[weakref.ref[Any]] = []
    load = load_module.load_model

    def checked(model, **settings):
        assert not [ref for ref in alive if ref() is not None]
        loaded = load(model, **settings)
        alive.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(checking, "load_model", checked)
    pipeline.quantize(Location(chat_llama), tmp_path / "out", calibrated, check=True)
    assert len(alive) == 2
    assert not [ref for ref in alive if ref() is not None]


def test_run_without_samples_isnt_checked(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "load_model", lambda *_a, **_k: pytest.fail("loaded"))
    assert pipeline.quantize(Location(llama), tmp_path / "out", recipe(), check=True).check is None


@pytest.mark.parametrize("error", [ModelError("no such thing"), MemoryError()])
def test_check_that_fails_is_a_warning(llama, tmp_path, calibrated, monkeypatch, error):
    def fail(*_args, **_settings):
        raise error

    monkeypatch.setattr(checking, "load_model", fail)
    events: list[Any] = []
    out_dir = tmp_path / "out"
    result = pipeline.quantize(Location(llama), out_dir, calibrated, check=True, emit=events.append)
    assert result.check is None
    assert (out_dir / REPORT_NAME).is_file()
    message = warnings_in(events)[-1]
    assert "out is complete, but wasn't compared with the original: " in message
    assert "no such thing" in message or "memory of this machine is full" in message


def test_original_that_is_too_large_isnt_loaded(llama, tmp_path, calibrated, monkeypatch):
    monkeypatch.setattr(checking, "room", lambda _device: 1000)
    monkeypatch.setattr(checking, "load_model", lambda *_a, **_k: pytest.fail("loaded"))
    events: list[Any] = []
    pipeline.quantize(Location(llama), tmp_path / "out", calibrated, check=True, emit=events.append)
    assert "more than cpu has free" in warnings_in(events)[-1]


@pytest.mark.parametrize(
    ("text", "chats", "words"),
    [
        (0.1, 0.29, []),
        (0.1, None, []),
        (0.1, 0.31, ["much worse on chats"]),
        (0.001, 0.019, []),
        (0.001, 0.021, ["much worse on chats"]),
        (1.1, 0.4, ["far from the original"]),
        (0.5, 1.6, ["far from the original", "much worse on chats"]),
    ],
)
def test_warnings_are_of_results_that_are_bad(text, chats, words):
    messages = warnings_of(close(text, chats))
    assert len(messages) == len(words)
    for message, expected in zip(messages, words, strict=True):
        assert expected in message


def test_nothing_measured_warns_of_nothing():
    assert warnings_of(Closeness()) == []
