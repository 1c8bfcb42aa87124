"""Caches that can't be written or are damaged: the scores are the same, and a warning says so."""

import logging
from typing import Any

from qtool.storage.store import Store
from tests import families
from tests.evaluation_tasks.conftest import POSITIONS, save
from tests.helpers import warnings_in

TASK = "arc_easy"


def test_cache_that_cannot_be_written_stops_no_task(evaluate, tmp_path, monkeypatch):
    expected = evaluate(TASK, limit=2, cache=False).rows
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "file/cache"))
    said: list[Any] = []
    result = evaluate(TASK, limit=2, emit=said.append)
    assert result.rows == expected
    assert result.model.failures == ()
    messages = warnings_in(said)
    assert len(messages) == 2  # the answers, then the scores
    assert all("can't be kept" in message for message in messages)


def test_damaged_cache_is_begun_anew_with_a_warning(evaluate, caplog):
    expected = evaluate(TASK, limit=2).rows
    with Store() as store:
        store.path.write_bytes(b"\xff" * 5000)
    with caplog.at_level(logging.WARNING):
        again = evaluate(TASK, limit=2)
    assert again.rows == expected
    assert not again.model.tasks[0].cached
    assert "is begun anew" in caplog.text


def test_tokenizer_of_another_model_is_warned_of(evaluate, tmp_path):
    small = save(
        families.build("llama", vocab_size=90, max_position_embeddings=POSITIONS),
        tmp_path / "small",
    )
    said: list[Any] = []
    evaluate(TASK, model=small, limit=1, emit=said.append)
    assert any(
        "knows 96 tokens and its embedding has 90" in message for message in warnings_in(said)
    )
