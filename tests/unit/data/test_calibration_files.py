"""Calibration directories: whole, never replaced unasked, nothing in them trusted blindly."""

import contextlib
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qtool.data import calibration_files as files
from qtool.data.calibration import CalibrationSet, draw_samples
from qtool.data.corpora import Corpus
from qtool.errors import DataError, OutputError, QtoolError
from qtool.modeling.load import load_tokenizer
from tests.families import text

INTS = st.integers(-(2**63), 2**63 - 1)


@pytest.fixture(scope="module")
def tokenizer(llama):
    return load_tokenizer(llama)


@pytest.fixture(scope="module")
def drawn(tokenizer):
    return draw_samples(tokenizer, Corpus("words", text(100)), [16, 8, 16])


@pytest.fixture
def directory(drawn, tmp_path):
    files.save_calibration(drawn, tmp_path / "cal")
    return tmp_path / "cal"


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_samples_read_back_as_they_were(directory, drawn, tokenizer):
    again = files.load_calibration(directory, tokenizer)
    assert again.digest() == drawn.digest()
    assert sorted(contents(directory)) == sorted(files.FILE_NAMES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": torch.zeros(40)}, "tokens is float32 of 1 dim"),
        ({"tokens": torch.zeros(40, dtype=torch.int32)}, "tokens is int32"),
        ({"tokens": torch.zeros(4, 10, dtype=torch.int64)}, "tokens is int64 of 2 dim"),
        ({"lengths": torch.tensor([16.0, 8.0, 16.0])}, "lengths is float32"),
        ({"lengths": torch.tensor(40)}, "lengths is int64 of 0 dim"),
        ({"lengths": torch.tensor([16, 8, 15])}, "add up to 39, and there are 40"),
        ({"lengths": torch.tensor([40])}, "at least two samples"),
        ({"lengths": torch.tensor([], dtype=torch.int64)}, "at least two samples"),
        ({"lengths": torch.tensor([48, -8])}, "none may be empty"),
        ({"lengths": torch.tensor([40, 0])}, "none may be empty"),
        ({"lengths": torch.tensor([2**62, 2**62, 40])}, "add up to"),
        ({"tokens": torch.full((40,), -1)}, "token -1"),
        ({"tokens": torch.full((40,), 3)}, "don't belong together"),
        ({"lengths": torch.tensor([8, 16, 16])}, "don't belong together"),
        ({"tokens": None}, "can't be read"),
        ({"lengths": None}, "can't be read"),
    ],
)
def test_damaged_samples_are_one_sentence(directory, tokenizer, change, words):
    file = directory / files.SAMPLES_NAME
    tensors = {**load_file(file), **change}
    save_file({name: one for name, one in tensors.items() if one is not None}, file)
    with pytest.raises(DataError, match=words) as caught:
        files.load_calibration(directory, tokenizer)
    assert "qtool calibrate" in str(caught.value)


@pytest.mark.parametrize(
    "about",
    [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"digest": ' + b"9" * 5000 + b"}", b"{}"],
)
def test_damaged_provenance_is_one_sentence(directory, tokenizer, about):
    (directory / files.ABOUT_NAME).write_bytes(about)
    with pytest.raises(DataError, match=str(directory)):
        files.load_calibration(directory, tokenizer)


@pytest.mark.parametrize("name", [files.SAMPLES_NAME, files.ABOUT_NAME])
@pytest.mark.parametrize("kind", ["missing", "empty", "cut", "directory"])
def test_missing_or_cut_file_is_one_sentence(directory, tokenizer, name, kind):
    file = directory / name
    content = file.read_bytes()
    file.unlink()
    if kind == "directory":
        file.mkdir()
    elif kind != "missing":
        file.write_bytes(b"" if kind == "empty" else content[:-3])
    with pytest.raises(DataError, match=str(directory)):
        files.load_calibration(directory, tokenizer)


def test_what_is_there_is_replaced_only_if_asked(directory, tmp_path):
    files.check_no_calibration(tmp_path / "new")
    files.check_no_calibration(tmp_path)  # other files are nobody's business
    with pytest.raises(OutputError, match="--overwrite"):
        files.check_no_calibration(directory)
    files.check_no_calibration(directory, overwrite=True)


@pytest.mark.parametrize("name", (*files.FILE_NAMES, files.LENGTHS_NAME))
@pytest.mark.parametrize("content", ["{}", "mine"])
def test_file_that_isnt_ours_is_never_replaced(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="no calibration data of qtool"):
            files.check_no_calibration(tmp_path, overwrite=overwrite)


def test_model_directory_and_files_are_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "file").write_text("x")
    for name in ("model", "link", "model/../link/."):
        with pytest.raises(OutputError, match="model's own directory"):
            files.check_no_calibration(tmp_path / name, model_directory=tmp_path / "model")
    for name in ("file", "file/below", "x" * 300):
        with pytest.raises(OutputError):
            files.check_no_calibration(tmp_path / name)
            files.save_calibration(CalibrationSet((torch.ones(2).long(),), {}), tmp_path / name)


@pytest.mark.parametrize("failing", range(2))
def test_full_disk_leaves_the_old_data_whole(directory, drawn, monkeypatch, failing):
    before, calls, fsync = contents(directory), [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == failing + 1:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    other = CalibrationSet(drawn.samples[:2], drawn.provenance)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        files.save_calibration(other, directory)
    assert contents(directory) == before


def test_samples_get_their_name_first(directory, drawn, monkeypatch):
    replaced = []
    replace = Path.replace

    def noted(self, target):
        replaced.append(Path(target).name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noted)
    files.save_calibration(drawn, directory)
    assert replaced == list(files.FILE_NAMES)


@given(tokens=st.lists(INTS, max_size=8), lengths=st.lists(INTS, max_size=4))
def test_any_numbers_are_samples_or_one_sentence(tmp_path_factory, tokenizer, tokens, lengths):
    directory = tmp_path_factory.mktemp("any")
    tensors = {"tokens": tokens, "lengths": lengths}
    values = {name: torch.tensor(one, dtype=torch.int64) for name, one in tensors.items()}
    save_file(values, directory / files.SAMPLES_NAME)
    (directory / files.ABOUT_NAME).write_text(json.dumps({"digest": "x"}))
    with pytest.raises(QtoolError):
        files.load_calibration(directory, tokenizer)


def test_json_of_others_is_left_alone(tmp_path):
    (tmp_path / files.ABOUT_NAME).write_text("[]")
    with pytest.raises(OutputError, match=r"has a file calibration\.json but no calibration data"):
        files.check_no_calibration(tmp_path, overwrite=True)


@pytest.mark.parametrize("name", ["loop", "loop/inside"])
def test_link_that_leads_nowhere_is_refused_or_not_yet_there(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    with contextlib.suppress(OutputError):
        files.check_no_calibration(tmp_path / name, model_directory=tmp_path)
