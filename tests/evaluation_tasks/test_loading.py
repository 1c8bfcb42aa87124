"""What a task is asked with: the same for every model, and part of what scores are kept under."""

import random
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from qtool.errors import QtoolError
from qtool.evaluation import sandbox
from qtool.evaluation.harness import Tasks
from qtool.evaluation.tasks import TaskOptions, _kept, check_tasks, run_tasks
from qtool.modeling.locate import Location

NEVER: dict[str, Any] = {"digest": "", "dtype": "", "device": "", "backend": None}


def test_loading_draws_the_same_whatever_was_drawn_before(data, monkeypatch):
    """Some tasks, such as gpqa, shuffle their choices as they load."""
    tasks, drawn = Tasks(data), []
    shipped = tasks._manager.load

    def load(names: list[str]) -> Any:
        drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))
        return shipped(names)

    monkeypatch.setattr(tasks._manager, "load", load)
    for _ in range(2):
        tasks.load("lambada_openai")
    Tasks(data, seeds=(7, 7, 7, 7)).load("lambada_openai")
    assert drawn[0] == drawn[1] != drawn[2]


def test_other_revision_of_a_data_set_of_the_hub_is_another_run(monkeypatch):
    revision = ""

    def load_dataset(*_args: Any, **_options: Any) -> Any:
        rows = datasets.Dataset.from_list([{"text": "w3 w4 w5"}])
        rows._fingerprint = revision
        return datasets.DatasetDict(test=rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    places = set()
    options = TaskOptions(tasks=("lambada_openai",))
    for revision in ("first", "first", "second"):
        tasks = check_tasks(options)
        assert tasks.hub_data["lambada_openai"] == [revision]
        places.add(_kept("lambada_openai", NEVER, tasks, options).directory)
    assert len(places) == 2


def test_local_data_have_no_revision(data):
    assert check_tasks(TaskOptions(tasks=("arc_easy",), data_dir=data)).hub_data["arc_easy"] == []


def test_sandbox_that_cannot_be_set_up_is_found_before_a_model_is_loaded(data, monkeypatch):
    def refuse() -> Any:
        raise QtoolError("The sandbox can't be set up")

    monkeypatch.setattr(sandbox, "protections", refuse)
    asked = {"data_dir": data, "confirm_unsafe": True}
    check_tasks(TaskOptions(tasks=("arc_easy",), **asked))
    with pytest.raises(QtoolError, match="can't be set up"):
        check_tasks(TaskOptions(tasks=("arc_easy", "humaneval"), **asked))


def test_model_is_gone_before_the_next_is_loaded(data, long_llama):
    import gc
    import weakref

    from qtool.modeling.load import load_model

    loaded: list[Any] = []

    def load() -> Any:
        model = load_model(Location(long_llama))
        loaded.append(weakref.ref(model.model))
        return model

    options = TaskOptions(tasks=("arc_easy",), data_dir=data, limit=1)
    tasks = check_tasks(options)
    gc.disable()
    try:
        run_tasks(load, NEVER, tasks, options)
        assert loaded[0]() is None
    finally:
        gc.enable()
