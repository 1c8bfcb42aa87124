import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qtool.base import ignore_events
from qtool.errors import ModelError
from qtool.modeling import locate as module
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location, locate
from qtool.settings import cache_dir
from tests.robustness.gguf_files import write_gguf


def test_local_directory_stays_where_it_is_and_has_no_public_name(llama):
    location = locate(str(llama))
    assert (location.directory, location.public_name) == (llama, None)


def test_home_directory_is_expanded(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/model").directory == tmp_path / "model"


@pytest.mark.parametrize("model", ["./nothing", "../nothing", "a/b/c", "/nowhere/at/all", "a b"])
def test_missing_path_never_becomes_a_download(model, monkeypatch):
    monkeypatch.setattr(module, "_download", lambda _model: pytest.fail("asked the hub"))
    with pytest.raises(
        ModelError, match=r"No model directory .*Give a directory, a \.gguf file or"
    ):
        locate(model)


def test_hub_id_is_downloaded_and_is_the_public_name(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_download", lambda _model: tmp_path)
    location = locate("someone/model-1.5")
    assert (location.directory, location.public_name) == (tmp_path, "someone/model-1.5")


def test_failed_download_is_one_line(monkeypatch):
    import huggingface_hub

    def fail(*_args, **_kwargs):
        raise RuntimeError("404\nand a long story\nof many lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=r"No local directory 'someone/model', .*: 404\. Look at"):
        _ = locate("someone/model").directory


def test_only_harmless_files_are_downloaded(monkeypatch, tmp_path):
    import huggingface_hub

    asked: dict[str, Any] = {}

    def download(model, allow_patterns, ignore_patterns):
        asked.update(model=model, patterns=allow_patterns, ignored=ignore_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    _ = locate("someone/model").directory
    assert asked["model"] == "someone/model"
    assert not any("bin" in p or "py" in p or p == "*" for p in asked["patterns"])


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("config.json", True),
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("chat_template.jinja", True),
        ("additional_chat_templates/tool_use.jinja", True),
        ("LICENSE", True),
        ("LICENSE.txt", True),
        ("consolidated.safetensors", False),
        ("consolidated-00001-of-00002.safetensors", False),
        ("original/model.safetensors", False),
        ("onnx/config.json", False),
        ("pytorch_model.bin", False),
        ("modeling_mine.py", False),
    ],
)
def test_no_weights_are_downloaded_twice(name, wanted):
    from huggingface_hub.utils import filter_repo_objects

    allow, ignore = [*module.HUB_FILES, *module.HUB_ALSO], module.HUB_NOT
    found = filter_repo_objects([name], allow_patterns=allow, ignore_patterns=ignore)
    assert list(found) == [name] * wanted


@pytest.mark.parametrize("model", ["x" * 300, "~nobody-of-that-name/model", "a\0b"])
def test_impossible_name_is_one_sentence(model):
    with pytest.raises(ModelError, match="No model"):
        locate(model)


def test_looking_for_a_model_reads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "convert_gguf", lambda _path: pytest.fail("converted"))
    monkeypatch.setattr(module, "_download", lambda _model: pytest.fail("downloaded"))
    (tmp_path / "m.gguf").write_bytes(b"x")
    assert locate(str(tmp_path / "m.gguf")).path == tmp_path / "m.gguf"
    assert locate("someone/model").path is None


def test_a_model_is_fetched_once(tmp_path, monkeypatch):
    asked: list[str] = []

    def download(model):
        asked.append(model)
        return tmp_path

    monkeypatch.setattr(module, "_download", download)
    location = locate("someone/model")
    assert location.directory == location.directory == tmp_path
    assert asked == ["someone/model"]


def test_name_in_results_is_the_public_one_or_that_of_the_directory(tmp_path):
    assert Location(tmp_path / "mine").name == "mine"
    assert locate("someone/model").name == "someone/model"


def test_missing_gguf_file_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"No GGUF file .*m\.gguf"):
        locate(str(tmp_path / "m.gguf"))


def test_unknown_demo_model_is_refused_with_the_known_one():
    with pytest.raises(ModelError, match=r"No demo model 'demo:gpt5'\. Known: demo:smollm2"):
        locate("demo:gpt5")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"QTOOL_CACHE": "/a/b"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/qtool"),
        ({"HOME": "/home/somebody"}, "/home/somebody/.cache/qtool"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no HOME")
def test_cache_is_where_the_environment_says(monkeypatch, variables, expected):
    for name in ("QTOOL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)


def test_a_gguf_file_says_that_it_is_converted_with_each_tensor_and_once(tmp_path, monkeypatch):
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf")
    told: list[Any] = []
    for _ in range(2):
        location = replace(locate(str(tmp_path / "tiny.gguf")), emit=told.append)
        assert location.name == "tiny.gguf"
        assert (location.directory / "config.json").is_file()
        counted = [event for event in told if event.total]
        assert {event.what for event in told[:-1]} == {"converting tiny.gguf to float16, once"}
        assert told[-1].what == "opening tiny.gguf"
        assert [event.done for event in counted] == list(range(counted[0].total))


def test_what_a_location_tells_stays_in_its_process(llama):
    told: list[Any] = []
    location = replace(locate(str(llama)), emit=told.append)
    there = pickle.loads(pickle.dumps(location))
    assert there == location
    assert there.emit is ignore_events
    load_model(location)
    assert [event.what for event in told] == [f"loading {location.name}"]
