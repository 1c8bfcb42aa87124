"""The cache of dequantized GGUF files: whole or not there, and never trusted blindly."""

import importlib.util
import json
import logging
import os
import threading
import time
from pathlib import Path

import pytest

from qtool.base import Emit
from qtool.errors import MissingExtraError, ModelError
from qtool.modeling import gguf_cache
from qtool.modeling.gguf_cache import convert_gguf
from qtool.modeling.locate import locate
from qtool.storage.kept_folders import WHOLE_NAME


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    """Return a file whose conversion is a stand-in that counts its calls."""
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: True)
    path = tmp_path / "m.gguf"
    path.write_bytes(b"x")
    return path


@pytest.fixture
def calls(monkeypatch):
    made: list[Path] = []

    def save(_path: Path, target: Path, _emit: Emit) -> None:
        made.append(target)
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(bytes(100))

    monkeypatch.setattr(gguf_cache, "_save_dequantized", save)
    return made


def kept(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def test_file_that_only_calls_itself_gguf_is_refused_and_leaves_no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "m.gguf"
    path.write_bytes(b"no gguf at all")
    with pytest.raises(ModelError, match="transformers can't read this GGUF file"):
        _ = locate(str(path)).directory
    assert kept(tmp_path / "cache/gguf") == []


def test_gguf_without_its_reader_names_the_extra(gguf, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match="'demo' extra"):
        convert_gguf(gguf)


def test_converted_gguf_is_not_converted_twice(gguf, calls):
    first, second = convert_gguf(gguf), convert_gguf(gguf)
    assert first == second
    assert len(calls) == 1
    assert kept(first.parent) == [first.name]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", WHOLE_NAME])
@pytest.mark.parametrize("damage", ["missing", "cut", "changed", "[" * 9999, '{"files": 3}'])
def test_damaged_cache_is_made_anew_with_a_warning(gguf, calls, caplog, name, damage):
    directory = convert_gguf(gguf)
    file = directory / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-2])  # more than a line break
    else:
        file.write_bytes(b"\1" + content[1:] if damage == "changed" else damage.encode())
    with caplog.at_level(logging.WARNING):
        assert convert_gguf(gguf) == directory
    assert len(calls) == 2
    assert "is damaged, incomplete or of an earlier version, and is made anew" in caplog.text
    assert (directory / "model.safetensors").read_bytes() == bytes(100)
    assert kept(directory.parent) == [directory.name]


def test_what_an_earlier_version_made_is_made_anew(gguf, calls):
    directory = convert_gguf(gguf)
    about = json.loads((directory / WHOLE_NAME).read_text())
    del about["conversion"]  # the first had none
    (directory / WHOLE_NAME).write_text(json.dumps(about))
    assert convert_gguf(gguf) == directory
    assert len(calls) == 2


@pytest.mark.usefixtures("calls")
def test_leftover_of_a_killed_process_is_removed(gguf):
    directory = convert_gguf(gguf)
    partial = directory.with_name(f"{directory.name}.partial")
    directory.rename(partial)
    (partial / "leftover").write_bytes(b"x")
    assert convert_gguf(gguf) == directory
    assert not (directory / "leftover").exists()


@pytest.mark.usefixtures("calls")
def test_cache_that_cannot_be_written_says_what_to_set(gguf):
    gguf.with_name("cache").write_text("a file")
    with pytest.raises(ModelError, match=r"can't be kept .*Set QTOOL_CACHE"):
        convert_gguf(gguf)


def test_full_disk_is_one_sentence_and_leaves_nothing(gguf, monkeypatch, tmp_path):
    def full(_path: Path, target: Path, _emit: Emit) -> None:
        (target / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_cache, "_save_dequantized", full)
    with pytest.raises(ModelError, match=r"No space left on device\. Set QTOOL_CACHE"):
        convert_gguf(gguf)
    assert kept(tmp_path / "cache/gguf") == []


@pytest.mark.usefixtures("calls")
def test_files_are_synced_before_they_get_their_name(gguf, monkeypatch):
    synced: list[Path] = []
    fsync = os.fsync

    def noted(number: int) -> None:
        synced.append(Path(f"/proc/self/fd/{number}").readlink())
        fsync(number)

    monkeypatch.setattr(os, "fsync", noted)
    convert_gguf(gguf)
    names = [path.name for path in synced]
    assert {"config.json", "model.safetensors"} <= set(names[:2])
    assert any(name.startswith(WHOLE_NAME) for name in names[2:3])


def test_of_two_at_once_one_converts(gguf, monkeypatch):
    calls = []

    def save(_path: Path, target: Path, _emit: Emit) -> None:
        calls.append(target)
        time.sleep(0.2)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(gguf_cache, "_save_dequantized", save)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(convert_gguf(gguf))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(set(found)) == 1
