"""Kept scores: what their name depends on, and that damage is no score."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.evaluation import kept as kept_module
from qtool.evaluation.kept import KeptTask
from qtool.evaluation.scores import Score, TaskScores
from qtool.modeling.digest import model_digest
from qtool.storage.store import Store

SETTINGS = {"task": "t", "limit": None, "model": {"digest": "d", "dtype": "float32"}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "cache"))


def score(value=0.5, items=(1.0, 0.0), **changes):
    values = {
        "task": "t",
        "metric": "acc",
        "filter": "none",
        "value": value,
        "standard_error": None,
        "higher_is_better": True,
        "num_items": len(items),
        "shots": 0,
        "version": "1.0",
        "kind": "mean",
        "items": tuple(items),
    }
    return Score(**{**values, **changes})


def of_task(*scores):
    return TaskScores(name="t", scores=scores, seconds=1.5, truncated=3, settings={"a": [1]})


NUMBERS = st.floats(allow_nan=False)
ITEMS = st.lists(NUMBERS) | st.lists(st.tuples(NUMBERS, NUMBERS))


def refuse(message: str) -> None:
    pytest.fail(message)


def keep(scores: TaskScores, *rows: dict[str, Any]) -> None:
    with Store() as store:
        KeptTask(SETTINGS, store).finish(scores, rows, refuse)


def found() -> TaskScores | None:
    with Store() as store:
        return KeptTask(SETTINGS, store).scores()


@given(value=NUMBERS, items=ITEMS)
def test_scores_read_back_to_the_last_bit(value, items):
    before = of_task(score(value, items), score(group=True))
    keep(before)
    after = found()
    assert after is not None
    assert after.cached
    assert after.scores == before.scores
    assert math.copysign(1, after.scores[0].value) == math.copysign(1, value)
    assert (after.seconds, after.truncated, after.settings) == (1.5, 3, {"a": [1]})


def test_nothing_is_there_at_first():
    assert found() is None
    assert KeptTask(SETTINGS, None).scores() is None


def test_rows_read_back_and_answers_give_way():
    rows: list[dict[str, Any]] = [{"item": 0, "prompts": ["a\n\u2028b"]}, {"item": 1}]
    with Store() as store:
        task = KeptTask(SETTINGS, store)
        task.answers(refuse).add(b"k", 1.5)
        assert b"k" in task.answers(refuse)
        task.finish(of_task(score()), rows, refuse)
        assert b"k" not in task.answers(refuse)
        assert task.rows() == rows


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"null",
        b"7",
        b"[]",
        b"{}",
        b'{"scores": 3}',
        b'{"scores": ["s"], "name": "t"}',
        b'{"scores": [{"items": 3}]}',
        b'{"scores": [], "name": 3, "seconds": 1, "truncated": 0}',
        b'{"scores": [], "name": "t", "seconds": "1", "truncated": 0}',
        b'{"scores": [], "name": "t", "seconds": 1, "truncated": true}',
        b"[" * 100_000,
    ],
)
def test_damaged_scores_are_none(content):
    keep(of_task(score()))
    with Store() as store:
        store.add("scores", KeptTask(SETTINGS, store).name, {b"task": content})
    assert found() is None


def test_scores_of_another_version_are_none():
    keep(of_task(score()))
    with Store() as store:
        name = KeptTask(SETTINGS, store).name
        values = json.loads(store.read("scores", name)[b"task"])
        del values["scores"][0]["kind"]
        store.add("scores", name, {b"task": json.dumps(values).encode()})
    assert found() is None


@pytest.mark.parametrize("key", [b"task", b"items"])
def test_scores_without_rows_and_rows_without_scores_are_none(key):
    keep(of_task(score()), {"item": 0})
    with Store() as store:
        store.remove("scores", KeptTask(SETTINGS, store).name, [key])
    assert found() is None


@pytest.mark.parametrize(
    "changes",
    [{"task": "u"}, {"limit": 3}, {"model": {"digest": "e", "dtype": "float32"}}, {"seed": None}],
)
def test_every_setting_is_part_of_the_name(changes):
    assert KeptTask(SETTINGS, None).name != KeptTask({**SETTINGS, **changes}, None).name


@pytest.mark.parametrize("library", ["qtool", "torch", "transformers", "lm-eval", "datasets"])
def test_every_version_is_part_of_the_name(monkeypatch, library):
    before = KeptTask(SETTINGS, None).name
    versions = kept_module.library_versions()
    assert library in versions
    monkeypatch.setattr(kept_module, "library_versions", lambda: {**versions, library: "0.0.1"})
    assert KeptTask(SETTINGS, None).name != before


FILES = ["model.safetensors", "model-00002-of-00002.safetensors", "config.json", "tokenizer.json"]
FILES += ["tokenizer_config.json", "generation_config.json", "model.safetensors.index.json"]
FILES += ["tokenizer.model", "merges.txt", "chat_template.jinja"]


@pytest.fixture
def directory(tmp_path):
    place = tmp_path / "model"
    place.mkdir()
    for name in [*FILES, "README.md", "quantization_report.json"]:
        (place / name).write_text(f"content of {name}")
    return place


@pytest.mark.parametrize("name", FILES)
def test_digest_changes_with_each_file(directory, name):
    before = model_digest(directory)
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[:-1] + b"X")
    changed = model_digest(directory)
    (directory / name).unlink()
    assert len({before, changed, model_digest(directory)}) == 3
    (directory / name).write_bytes(content)
    assert model_digest(directory) == before


def test_digest_tells_which_file_has_what(directory):
    before = model_digest(directory)
    first, second = directory / "config.json", directory / "tokenizer.json"
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    assert model_digest(directory) != before


@pytest.mark.parametrize("name", ["README.md", "quantization_report.json"])
def test_digest_leaves_out_what_decides_nothing(directory, name):
    before = model_digest(directory)
    (directory / name).write_text("other")
    assert model_digest(directory) == before


def test_digest_does_not_depend_on_the_place(directory, tmp_path):
    moved = tmp_path / "elsewhere"
    before = model_digest(directory)
    directory.rename(moved)
    assert model_digest(moved) == before
