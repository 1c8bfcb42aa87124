"""What a task is asked with: the same for every model, and part of what scores are kept under."""

import random
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from qtool.errors import QtoolError
from qtool.evaluation.kept import KeptTask
from qtool.evaluation.lm_eval import harness
from qtool.evaluation.lm_eval.run import _settings, run_tasks
from qtool.modeling.locate import Location
from qtool.storage.digests import files_digest
from tests.evaluation_tasks.conftest import asked_of

NEVER: dict[str, Any] = {"digest": "", "dtype": "", "device": "", "backend": None}


def test_loading_draws_the_same_whatever_was_drawn_before(data, monkeypatch):
    """Some tasks, such as gpqa, shuffle their choices as they load."""
    tasks, drawn = asked_of("lambada_openai", data_dir=data), []
    shipped = tasks._manager.load

    def load(names: list[str]) -> Any:
        drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))
        return shipped(names)

    monkeypatch.setattr(tasks._manager, "load", load)
    for _ in range(2):
        tasks.load("lambada_openai")
    asked_of("lambada_openai", data_dir=data, seed=7).load("lambada_openai")
    assert drawn[0] == drawn[1] != drawn[2]


def test_other_revision_of_a_data_set_of_the_hub_is_another_run(monkeypatch):
    revision = ""

    def load_dataset(*_args: Any, **_options: Any) -> Any:
        rows = datasets.Dataset.from_list([{"text": "w3 w4 w5"}])
        rows._fingerprint = revision
        return datasets.DatasetDict(test=rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    places = set()
    for revision in ("first", "first", "second"):
        tasks = asked_of("lambada_openai")
        tasks.check()
        assert tasks.digests["lambada_openai"] == [revision]
        places.add(KeptTask(_settings("lambada_openai", NEVER, tasks), None).name)
    assert len(places) == 2


def test_local_data_have_the_digest_of_their_files(data):
    tasks = asked_of("arc_easy", data_dir=data)
    tasks.check()
    assert tasks.digests["arc_easy"] == files_digest([data / "mcqa/arc_easy_test.jsonl"])


def test_sandbox_that_cannot_be_set_up_is_found_before_a_model_is_loaded(data, monkeypatch):
    def refuse() -> Any:
        raise QtoolError("The sandbox can't be set up")

    monkeypatch.setattr(harness, "protections", refuse)
    asked = {"data_dir": data, "confirm_unsafe": True}
    asked_of("arc_easy", **asked).check()
    with pytest.raises(QtoolError, match="can't be set up"):
        asked_of("arc_easy", "humaneval", **asked).check()


def test_model_is_gone_before_the_next_is_loaded(data, long_llama):
    import gc
    import weakref

    from qtool.modeling.load import load_model

    loaded: list[Any] = []

    def load() -> Any:
        model = load_model(Location(long_llama))
        loaded.append(weakref.ref(model.model))
        return model

    tasks = asked_of("arc_easy", data_dir=data, limit=1)
    tasks.check()
    gc.disable()
    try:
        run_tasks(load, NEVER, tasks)
        assert loaded[0]() is None
    finally:
        gc.enable()
