"""`qtool cache`: what is kept, and how it is cleared."""

import json

import pytest

from qtool.storage.store import Store
from tests.cli.conftest import Cli

MODEL = "0123456789abcdef" * 2


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "cache"))
    with Store() as store:
        store.add("answers", "task", {b"a": b"1", b"b": b"2"})
        store.add("digests", "", {b"/file": b"digest"})
    (tmp_path / "cache/gguf" / MODEL).mkdir(parents=True)
    (tmp_path / "cache/gguf" / MODEL / "model.safetensors").write_bytes(bytes(5000))
    (tmp_path / "cache/gguf" / f"{MODEL}.lock").touch()
    (tmp_path / "cache/imported" / MODEL / "theirs").mkdir(parents=True)
    (tmp_path / "cache/imported" / MODEL / "theirs/config.json").write_bytes(bytes(30))
    (tmp_path / "cache/cuda").mkdir()
    (tmp_path / "cache/cuda" / f"{2 * MODEL}.cubin").write_bytes(bytes(70))
    return tmp_path / "cache"


def kept(cli: Cli, *arguments: str) -> dict[str, tuple[int, int]]:
    done = cli("cache", *arguments, "--json", "-")
    assert (done.code, done.said) == (0, [])
    return {one["kind"]: (one["entries"], one["num_bytes"]) for one in json.loads(done.out)["kept"]}


@pytest.mark.usefixtures("cache")
def test_all_that_is_kept_is_listed(cli: Cli):
    assert kept(cli) == {
        "answers": (2, 2),
        "digests": (1, 6),
        "gguf": (1, 5000),
        "imported": (1, 30),
        "cuda": (1, 70),
    }
    assert kept(cli, "gguf", "scores") == {"gguf": (1, 5000)}
    done = cli("cache")
    assert "of tasks that didn't end" in done.out
    assert "now" in done.out


@pytest.mark.usefixtures("cache")
def test_age_is_that_of_the_oldest_and_the_newest(cli: Cli, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("time.time", lambda: 1e9)
        with Store() as store:
            store.add("scores", "task", {b"a": b"1"})
        patch.setattr("time.time", lambda: 1e9 + 7 * 86_400)
        with Store() as store:
            store.add("scores", "task", {b"b": b"1"})
        patch.setattr("time.time", lambda: 1e9 + 9 * 86_400)
        assert "2 days to 9 days" in cli("cache", "scores").out


def test_clear_removes_what_is_named(cli: Cli, cache):
    assert kept(cli, "--clear", "answers") == {}
    assert kept(cli) == {"digests": (1, 6), "gguf": (1, 5000), "imported": (1, 30), "cuda": (1, 70)}
    assert kept(cli, "--clear", "gguf", "imported", "cuda") == {}
    assert not (cache / "gguf").exists()
    assert not (cache / "cuda").exists()


def test_what_a_user_has_in_folders_of_these_names_is_neither_counted_nor_removed(cli: Cli, cache):
    mine = {cache / "gguf/llama.gguf", cache / "demo/app.py", cache / "cuda/samples/vectorAdd.cu"}
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (cache / "gguf" / ("a" * 32)).symlink_to(cache / "demo")
    (cache / "demo" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(bytes(9))
    found = kept(cli)
    assert (found["gguf"][0], found["demo"], found["cuda"]) == (2, (1, 9), (1, 70))
    assert kept(cli, "--clear", "gguf", "demo", "cuda") == {}
    left = {path for name in ("gguf", "demo", "cuda") for path in (cache / name).rglob("*")}
    assert {path for path in left if path.is_file()} == mine


@pytest.mark.usefixtures("cache")
def test_clear_alone_leaves_models(cli: Cli):
    assert kept(cli, "--clear") == {"gguf": (1, 5000), "imported": (1, 30), "cuda": (1, 70)}


@pytest.mark.usefixtures("cache")
def test_unknown_names_are_refused_and_nothing_is_cleared(cli: Cli):
    done = cli("cache", "--clear", "answers", "everything")
    assert done.code == 2
    assert "everything" in done.err
    assert "answers" in kept(cli)


def test_empty_cache_is_listed_and_cleared_without_being_made(cli: Cli, tmp_path, monkeypatch):
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "none"))
    assert kept(cli) == kept(cli, "--clear") == {}
    assert not (tmp_path / "none").exists()
