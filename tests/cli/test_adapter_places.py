"""Where an adapter goes: found before anything is trained, and never at the cost of another's."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from qtool.checkpoint.adapter_files import adapter_digest, read_adapter
from qtool.errors import OutputError
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.pipeline.adapt import AdaptRequest
from qtool.pipeline.adapt import adapt as run_adapt
from qtool.steps.adapt_model import AdaptOptions
from tests.families import text

FILES = {"adapter.json", "adapter.safetensors", "curve.jsonl"}


@pytest.fixture
def adapt(checkpoint, tmp_path, monkeypatch):
    """Return a function that trains one step into a directory; the current one is empty."""
    data = tmp_path / "pairs.jsonl"
    lines = [{"prompt": text(4, seed), "completion": text(4, seed + 50)} for seed in range(4)]
    data.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options = AdaptOptions(epochs=1.0, batch_size=4)

    def run(directory, **flags):
        model = Location(checkpoint)
        return run_adapt(
            AdaptRequest(model=model, data=data, directory=directory, options=options, **flags)
        )

    return run


def test_the_current_directory_a_link_and_one_that_stays_take_an_adapter(adapt, tmp_path):
    adapt(Path())
    assert {path.name for path in Path().iterdir()} == FILES
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    adapt(tmp_path / "link")
    assert {path.name for path in (tmp_path / "real").iterdir()} == FILES
    adapt(tmp_path / "link", overwrite=True)
    assert read_adapter(tmp_path / "real").kind == "alpha"
    assert {path.name for path in tmp_path.iterdir()} == {"here", "link", "real", "pairs.jsonl"}


@pytest.mark.parametrize("name", ["loop", "dangling", "dangling/below", "file/below", "x/../.."])
def test_what_can_take_no_adapter_is_refused_before_a_model_is_loaded(
    name, adapt, tmp_path, monkeypatch
):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("qtool.pipeline.adapt.load_model", None)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError):
        adapt(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_work_of_a_living_run_is_left_alone(adapt, tmp_path):
    work = tmp_path / "mine.partial"
    work.mkdir()
    descriptor = os.open(work, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(OutputError, match="Another run is writing"):
            adapt(tmp_path / "mine", **flags)
    os.close(descriptor)
    adapt(tmp_path / "mine")
    assert not work.exists()


def test_an_adapter_that_has_come_in_between_is_not_replaced(adapt, tmp_path, monkeypatch):
    adapt(tmp_path / "theirs")
    digest = adapter_digest(tmp_path / "theirs")

    def load(*args: Any, **options: Any) -> Any:
        (tmp_path / "theirs").rename(tmp_path / "mine")
        return load_model(*args, **options)

    monkeypatch.setattr("qtool.pipeline.adapt.load_model", load)
    with pytest.raises(OutputError, match=r"has an adapter. Pass --overwrite"):
        adapt(tmp_path / "mine")
    assert adapter_digest(tmp_path / "mine") == digest
    assert {path.name for path in tmp_path.iterdir()} == {"here", "mine", "pairs.jsonl"}


def test_a_folder_of_that_name_is_not_taken_for_work(adapt, tmp_path):
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial/thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="isn't the work of `qtool adapt`"):
        adapt(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine.partial/thesis.txt").read_text() == "mine"
