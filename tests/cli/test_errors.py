"""What a user can do wrong: exit code 1 and one line that says what, where and what next."""

import importlib
import json
import logging
from collections.abc import Iterator

import pytest

from qtool import pipeline
from tests.cli.conftest import Cli, Done


def one_line(done: Done, *words: str) -> None:
    assert done.code == 1
    assert done.out == ""
    (line,) = done.said
    assert line.startswith("Error: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits", "9"], ["num_bits", "8"]),
        (["--bits", "0"], ["num_bits", "1"]),
        (["--group-size", "0"], ["--group-size is '0'", "'row'"]),
        (["--group-size", "-1"], ["--group-size"]),
        (["--group-size", "many"], ["--group-size is 'many'", "'row'"]),
        (["--method", "rtm"], ["No 'rtm' in methods", "Did you mean 'rtn'"]),
        (["--recipe", "rtn-w4g12"], ["Did you mean 'rtn-w4g128'"]),
        (["--recipe", "no/such.yaml"], ["No recipe file no/such.yaml"]),
        (["--set", "weights.scheme.num_bitz=3"], ["Did you mean 'num_bits'", "--set"]),
        (["--set", "seed"], ["isn't an assignment", "--set a.b=value"]),
        (
            ["--method", "rtn", "--set", "weights.options.clip_rato=1"],
            ["Did you mean 'clip_ratio'"],
        ),
        (["--method", "rtn", "--set", "weights.options.clip_ratio=7"], ["clip_ratio is 7"]),
        (
            ["--method", "rtn", "--bits", "1", "--set", "weights.scheme.symmetric=true"],
            ["Use 'bcq' for 1 bit"],
        ),
        (
            ["--set", "weights.overrides=[{match: nothing, skip: true}]"],
            ["weights.overrides.0.match is 'nothing'", "14 layers"],
        ),
    ],
)
def test_impossible_option_is_one_line(cli: Cli, llama, tmp_path, options, words):
    one_line(cli("quantize", *options, llama, tmp_path / "out"), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def m(llama, tmp_path, monkeypatch):
    """Stand where `m` is a model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").symlink_to(llama)


@pytest.mark.parametrize("command", ["quantize", "eval", "bench", "inspect"])
def test_missing_model_is_one_line(cli: Cli, tmp_path, command):
    arguments = [tmp_path / "nothing"]
    if command == "quantize":
        arguments.append(tmp_path / "out")
    one_line(cli(command, *arguments), "nothing")


@pytest.mark.parametrize("command", ["bench", "inspect"])
def test_unquantized_model_in_place_of_a_checkpoint_is_one_line(cli: Cli, llama, command):
    one_line(cli(command, llama), "isn't quantized")


def test_existing_output_is_one_line(cli: Cli, llama, checkpoint):
    one_line(cli("quantize", llama, checkpoint), "--overwrite")


def test_unfinished_run_is_one_line(cli: Cli, llama, tmp_path):
    from qtool.checkpoint.marks import Job, write_job

    (tmp_path / "out.partial").mkdir()
    write_job(tmp_path / "out.partial", Job(fingerprint={}))
    one_line(cli("quantize", llama, tmp_path / "out"), "--resume", "--overwrite")


def test_unknown_text_is_one_line(cli: Cli, llama):
    one_line(cli("eval", llama, "--dataset", "wikitext"), "Known: dialogues", "wikitext2-test")


def test_context_longer_than_the_model_is_one_line(cli: Cli, llama, text_file):
    one_line(cli("eval", llama, "--dataset", text_file), "512 positions", "--context-length 512")


def test_unknown_backend_is_one_line(cli: Cli, checkpoint, text_file):
    options = ["--dataset", text_file, "--context-length", 64, "--backend", "fast"]
    one_line(cli("eval", checkpoint, *options), "No 'fast' in backends")


def test_unwritable_json_target_is_one_line(cli: Cli, checkpoint, tmp_path):
    done = cli("inspect", checkpoint, "--json", tmp_path / "no" / "such" / "file.json")
    one_line(done, "Can't write", "there is no folder")


@pytest.mark.usefixtures("m")
def test_message_with_markup_and_line_breaks_stays_one_plain_line(cli: Cli, monkeypatch, tmp_path):
    from qtool.errors import ModelError

    def fail(*_args, **_kwargs):
        raise ModelError("first [bold]line[/bold]\n   second\n")

    monkeypatch.setattr(pipeline, "plan", fail)
    one_line(cli("quantize", "--dry-run", "m", tmp_path), "first [bold]line[/bold] second")


@pytest.mark.usefixtures("m")
def test_interrupt_says_how_to_go_on(cli: Cli, monkeypatch, tmp_path):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "quantize", stop)
    done = cli("quantize", "m", tmp_path / "out")
    assert done.code == 130
    assert done.said == [
        "Error: Interrupted. Finished layers are kept: the same command with --resume goes on "
        "after them."
    ]


@pytest.mark.usefixtures("m")
@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["calibrate", "m", "cal"], "Nothing was written."),
        (["bench", "m"], "Nothing was kept."),
        (["eval", "m"], "Nothing was kept."),
        (["eval", "m", "--tasks", "arc_easy", "--no-cache"], "Nothing was kept."),
        (["eval", "m", "--tasks", "arc_easy"], "the same command goes on with the next requests"),
    ],
)
def test_interrupt_promises_no_more_than_is_kept(cli: Cli, monkeypatch, arguments, kept):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    for name in ("calibrate", "bench", "evaluate"):
        monkeypatch.setattr(pipeline, name, stop)
    done = cli(*arguments)
    assert done.code == 130
    (line,) = done.said
    assert line.startswith("Error: Interrupted. ")
    assert kept in line
    assert "--resume" not in line


def test_interrupted_training_goes_on_from_its_last_look(cli: Cli, llama, monkeypatch, tmp_path):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("qtool.pipeline.train"), "train", stop)
    (tmp_path / "texts.jsonl").write_text("{}")
    done = cli("train", llama, tmp_path / "texts.jsonl", tmp_path / "out")
    assert done.code == 130
    assert "Interrupted. The same command with --resume goes on from the last look" in done.said[-1]


@pytest.mark.parametrize(
    "content",
    [b"", b"not json", json.dumps({"quantization_config": {}}).encode()],
)
def test_damaged_checkpoint_is_one_line(cli: Cli, tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    for command in ("inspect", "bench", "eval"):
        one_line(cli(command, tmp_path))


def test_no_data_and_data_at_once_is_one_line(cli: Cli, llama, tmp_path):
    for options in (["--calibration", tmp_path], ["--set", "calibration.num_samples=4"]):
        done = cli(
            "quantize", "--method", "bcq", "--no-calibration", *options, llama, tmp_path / "o"
        )
        one_line(done, "--no-calibration")


@pytest.fixture
def own_level() -> Iterator[None]:
    """Give qtool's logger back as it was."""
    logger = logging.getLogger("qtool")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.usefixtures("own_level")
@pytest.mark.parametrize("level", ["debug", "", None])
def test_a_log_has_where_an_error_comes_from(cli: Cli, monkeypatch, caplog, tmp_path, level):
    if level is None:
        monkeypatch.delenv("QTOOL_LOG", raising=False)
    else:
        monkeypatch.setenv("QTOOL_LOG", level)
    done = cli("inspect", tmp_path / "nothing")
    assert done.code == 1
    assert bool(caplog.records) == (level == "debug")
    assert ("Traceback" in caplog.text) == (level == "debug")


def test_an_unknown_level_is_one_line(cli: Cli, monkeypatch):
    monkeypatch.setenv("QTOOL_LOG", "verbose")
    one_line(cli("methods"), "No 'verbose' in levels of $QTOOL_LOG. Known: debug, info, warning.")
