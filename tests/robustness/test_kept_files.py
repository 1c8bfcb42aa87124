"""What qtool wrote for itself, damaged: calibration data is refused, caches are made anew."""

import json
import os
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from qtool import pipeline
from qtool.data.calibration_files import load_calibration
from qtool.evaluation.kept import KeptTask
from qtool.evaluation.scores import Score, TaskScores
from qtool.modeling.load import load_tokenizer
from qtool.modeling.locate import Location, locate
from qtool.modeling.source import open_source
from qtool.recipe.calibration import CalibrationSection
from qtool.storage.digests import SETTLED_NS, files_digest
from qtool.storage.store import Store
from tests.robustness.child import run_apart
from tests.robustness.fuzzing import Change, fuzz, sizes
from tests.robustness.gguf_files import write_gguf
from tests.robustness.safetensors_files import damaged_safetensors
from tests.robustness.values import changed_trees, damaged, json_bytes

SAMPLES, ABOUT = "samples.safetensors", "calibration.json"
SETTINGS = {"digest": "d", "task": "x"}
SCORE = Score(
    task="x",
    metric="acc",
    filter="none",
    value=0.5,
    standard_error=0.1,
    higher_is_better=True,
    num_items=2,
    shots=0,
    version="1.0",
    kind="mean",
    items=(1.0, 0.0),
)
SCORES = TaskScores(name="x", scores=(SCORE,), seconds=1.0, truncated=0, settings={"a": 1})
ROWS = [{"item": 1, "prompts": ["w3"]}]
ANSWERS = {b"a": -1.5, b"b": "w3 w4", b"c": (-1.5, 1.0)}


def damaged_files(good: Path) -> st.SearchStrategy[Change]:
    """Draw one changed file of a directory: values, bytes, or gone."""
    return st.sampled_from(sorted(p for p in good.rglob("*") if p.is_file())).flatmap(
        lambda file: _damaged_file(file, str(file.relative_to(good)))
    )


def _damaged_file(file: Path, name: str) -> st.SearchStrategy[Change]:
    content = file.read_bytes()
    bytes_ = damaged(content).map(lambda d: Change(f"{name}: {d[0]}", {name: d[1]}))
    gone = st.just(Change(f"no {name}", {name: None}))
    if file.suffix == ".safetensors":
        header = damaged_safetensors(content).map(lambda d: Change(d[0], {name: d[1]}))
        return header | header | bytes_ | gone
    if file.suffix == ".json":
        trees = changed_trees(json.loads(content)).map(
            lambda d: Change(f"{name}: {d[0]}", {name: json_bytes(d[1])})
        )
        return trees | trees | bytes_ | gone
    return bytes_ | gone


@pytest.fixture(scope="module")
def calibration(llama, text_file, tmp_path_factory):
    directory = tmp_path_factory.mktemp("calibration")
    section = CalibrationSection(dataset=str(text_file), num_samples=6, sequence_length=24)
    pipeline.calibrate(Location(llama), directory, section)
    return directory


def read_samples(change: Change, good: Path, target: Path, tokenizer: Any) -> Any:
    samples = load_calibration(change.applied(good, target), tokenizer).samples
    if not all(sample.dtype == torch.int64 and sample.dim() == 1 for sample in samples):
        return "samples of another type"
    return [sample.tolist() for sample in samples]


@sizes(25)
def test_calibration_data_is_read_as_it_was_drawn_or_refused(size, calibration, llama, tmp_path):
    tokenizer, target = load_tokenizer(llama), tmp_path / "changed"
    expected = read_samples(Change("nothing"), calibration, target, tokenizer)
    assert len(expected) == 6

    def check(change: Change) -> str | None:
        outcome = run_apart(read_samples, change, calibration, target, tokenizer)
        if outcome.kind != "result":
            return outcome.complaint
        return None if outcome.value == expected else "other samples"

    fuzz(damaged_files(calibration), check, size)


def in_cache(change: Change, good: Path, target: Path) -> None:
    os.environ["QTOOL_CACHE"] = str(change.applied(good, target))


def digest_with(change: Change, good: Path, target: Path, file: Path) -> str:
    in_cache(change, good, target)
    return files_digest([file])


@sizes(10)
def test_damaged_digests_are_taken_anew(size, tmp_path, monkeypatch):
    good, file = tmp_path / "cache", tmp_path / "file"
    monkeypatch.setenv("QTOOL_CACHE", str(good))
    file.write_bytes(b"content")
    time.sleep(SETTLED_NS / 1e9 + 0.1)  # only then is a digest remembered
    expected = files_digest([file])
    with Store() as store:
        assert store.path.is_file()

    def check(change: Change) -> str | None:
        outcome = run_apart(digest_with, change, good, tmp_path / "changed", file)
        same = outcome.kind != "result" or outcome.value == expected
        return outcome.complaint or (None if same else "another digest")

    fuzz(damaged_files(good), check, size)


def kept_scores(change: Change, good: Path, target: Path) -> str | None:
    """Read kept scores and answers, and return what is wrong with what was taken."""
    in_cache(change, good, target)
    with Store() as store:
        place = KeptTask(SETTINGS, store)
        answers = place.answers(lambda _message: None)
        if any(answers[key] != answer for key, answer in ANSWERS.items() if key in answers):
            return "other answers"
        scores, rows = place.scores(), place.rows()
        answers.add(b"d", 1.5)
    with Store() as again:
        place = KeptTask(SETTINGS, again)
        if b"d" not in place.answers(lambda _message: None):
            return "nothing can be added"
    if scores is None:
        return None
    if rows != ROWS:
        return "other rows"
    pairs: list[tuple[Any, Any]] = [(scores, SCORES), *((one, SCORE) for one in scores.scores)]
    for taken, written in pairs:
        for field in fields(written):
            if field.name in ("cached", "standard_error", "shots"):
                continue
            one, other = getattr(taken, field.name), getattr(written, field.name)
            if not isinstance(one, type(other)):
                return f"{field.name} is {one!r:.40}"
    return None


@sizes(15)
def test_damaged_scores_and_answers_are_measured_anew(size, tmp_path, monkeypatch):
    good = tmp_path / "cache"
    monkeypatch.setenv("QTOOL_CACHE", str(good))
    with Store() as store:
        place = KeptTask(SETTINGS, store)
        place.finish(SCORES, ROWS, pytest.fail)
        for key, answer in ANSWERS.items():
            place.answers(pytest.fail).add(key, answer)
        assert place.scores() is not None

    def check(change: Change) -> str | None:
        outcome = run_apart(kept_scores, change, good, tmp_path / "changed")
        return outcome.complaint or outcome.value

    fuzz(damaged_files(good), check, size)


def converted(change: Change, good: Path, target: Path, gguf: Path) -> dict[str, Any]:
    in_cache(change, good, target)
    source = open_source(Location(gguf))
    return {name: source.read(name).tolist() for name in source.names()}


@sizes(10)
def test_a_damaged_conversion_is_made_anew(size, tmp_path, monkeypatch):
    good, gguf = tmp_path / "cache", tmp_path / "tiny.gguf"
    monkeypatch.setenv("QTOOL_CACHE", str(good))
    write_gguf(gguf)
    _ = locate(str(gguf)).directory
    expected = converted(Change("nothing"), good, tmp_path / "changed", gguf)

    def check(change: Change) -> str | None:
        outcome = run_apart(converted, change, good, tmp_path / "changed", gguf)
        if outcome.kind != "result":
            return outcome.complaint or f"refused: {outcome.text[:99]}"
        return None if outcome.value == expected else "other weights"

    fuzz(damaged_files(good), check, size)


def read_gguf(content: bytes, gguf: Path, cache: Path) -> None:
    os.environ["QTOOL_CACHE"] = str(cache)
    gguf.write_bytes(content)
    open_source(Location(gguf))


@sizes(10)
def test_a_damaged_gguf_file_is_read_or_refused(size, tmp_path):
    gguf = tmp_path / "good.gguf"
    write_gguf(gguf)

    def check(drawn: tuple[str, bytes]) -> str | None:
        return run_apart(read_gguf, drawn[1], tmp_path / "x.gguf", tmp_path / "cache").complaint

    fuzz(damaged(gguf.read_bytes()), check, size)
