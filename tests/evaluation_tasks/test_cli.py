"""`qtool eval --tasks`, as a user calls it: tables, JSON, Markdown, and no network."""

import json
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import families
from tests.cli.conftest import Cli, cli
from tests.evaluation_tasks.conftest import save
from tests.task_rows import SAMPLE

__all__ = ["cli"]  # the fixture


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Refuse every connection; returns those that were tried."""
    tried: list[Any] = []

    def refuse(*arguments: Any, **_options: Any) -> Any:
        tried.append(arguments)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield tried
    assert tried == []


def test_local_data_need_no_network(cli: Cli, brief_llama, no_network):
    tasks = "humaneval,mmlu_astronomy,mmlu_marketing"
    options = ["--data-dir", SAMPLE, "--limit", "2", "--confirm-run-unsafe-code"]
    done = cli("eval", brief_llama, "--tasks", tasks, *options)
    assert done.code == 0, done.err
    assert no_network == []
    assert done.said == []
    for words in ("pass@1, create_test", "mmlu_astronomy", "first 2 items", "Programs ran with: "):
        assert words in done.out


def report(cli: Cli, *arguments: Any) -> Any:
    done = cli("eval", *arguments, "--json", "-")
    assert done.code == 0, done.err
    assert done.said == []

    def no_constant(name: str) -> Any:
        raise AssertionError(f"{name} isn't JSON")

    return json.loads(done.out, parse_constant=no_constant)


def test_json_is_the_only_thing_on_stdout_and_has_no_items(cli: Cli, long_llama, data):
    options = ["--tasks", "hellaswag,wikitext", "--data-dir", data]
    value = report(cli, long_llama, *options)
    assert '"items"' not in json.dumps(value["model"]["tasks"])
    assert value["original"] is None
    assert {(row["task"], row["metric"]) for row in value["rows"]} == {
        ("hellaswag", "acc"),
        ("hellaswag", "acc_norm"),
        ("wikitext", "word_perplexity"),
        ("wikitext", "byte_perplexity"),
        ("wikitext", "bits_per_byte"),
    }
    (first, _) = value["model"]["tasks"]
    assert first["settings"]["longest"] == 2048
    assert first["settings"]["model"]["dtype"] == "float32"
    assert value["versions"]["lm-eval"] == first["settings"]["versions"]["lm-eval"]
    assert value["rows"][0]["num_items"] == 7


def test_longest_requests_are_those_of_the_model(cli: Cli, long_llama, data, tmp_path):
    brief = save(families.build("llama", max_position_embeddings=13), tmp_path / "brief")
    options = ["--tasks", "arc_easy", "--data-dir", data, "--baseline", brief]
    done = cli("eval", long_llama, *options)
    assert done.code == 0, done.err
    assert "at most 2048 tokens" in done.out
    assert re.search(r"brief: \d+ requests didn't fit into 13 tokens", done.out)
    assert "2048 tokens, and were cut" not in done.out


def test_json_to_a_file_leaves_the_table(cli: Cli, long_llama, data, tmp_path):
    target = tmp_path / "scores.json"
    options = ["--tasks", "arc_easy", "--data-dir", data, "--json", target]
    done = cli("eval", long_llama, *options)
    assert done.code == 0, done.err
    rows = json.loads(target.read_text())["rows"]
    for row in rows:
        assert f"{row['value']:.4f} ± {row['standard_error']:.4f}" in done.out
    assert "float32 on cpu, batch size auto, at most 2048 tokens" in done.out


def test_markdown_has_all_rows(cli: Cli, long_llama, data, tmp_path):
    target = tmp_path / "scores.md"
    arguments = ["eval", long_llama, "--tasks", "arc_easy", "--data-dir", data, "--markdown"]
    done = cli(*arguments, target)
    assert done.code == 0, done.err
    assert "arc_easy" in done.out
    text = target.read_text()
    header, line, *rows = text.splitlines()
    assert header == f"| task | metric | shots | items | {long_llama.name} |"
    assert line == "| :--- | :--- | ---: | ---: | ---: |"
    assert [row.split(" | ")[1] for row in rows[:2]] == ["acc", "acc_norm"]
    assert rows[2] == ""
    assert all(row.startswith("- ") for row in rows[3:])
    again = cli(*arguments, "-")
    assert again.out.splitlines()[:4] == text.splitlines()[:4]
    assert "kept from an earlier run: arc_easy" in again.out


def test_second_call_loads_no_model(cli: Cli, long_llama, data, request):
    options = ["--tasks", "arc_easy", "--data-dir", data]
    first = report(cli, long_llama, *options)
    request.getfixturevalue("no_model")
    second = report(cli, long_llama, *options)
    assert second["rows"] == first["rows"]
    assert [task["cached"] for task in second["model"]["tasks"]] == [True]


def test_baseline_is_compared_item_by_item(cli: Cli, long_llama, long_checkpoint, data):
    options = ["--tasks", "wikitext,arc_easy", "--data-dir", data]
    value = report(cli, long_checkpoint, "--baseline", long_llama, *options)
    assert value["original"]["name"] == long_llama.name
    assert value["original"]["average_bits"] == 16
    assert value["model"]["average_bits"] < 4
    for row in value["rows"]:
        paired = row["paired"]
        assert paired["items"] == row["num_items"] == 7
        assert paired["original"] == pytest.approx(row["original"], rel=1e-12)
        assert paired["quantized"] == pytest.approx(row["value"], rel=1e-12)
        assert paired["difference"] == pytest.approx(row["value"] - row["original"], abs=1e-9)
        assert row["verdict"]
    perplexities = [row for row in value["rows"] if row["task"] == "wikitext"]
    assert {row["verdict"] for row in perplexities} != {"identical"}
    done = cli("eval", long_checkpoint, "--baseline", long_llama, *options)
    for words in ("difference", "verdict", "Differences are paired", "kept from an earlier run"):
        assert words in done.out


@pytest.mark.parametrize("cache", ["--cache", "--no-cache"])
def test_model_is_identical_to_itself(cli: Cli, long_llama, data, cache):
    options = ["--tasks", "arc_easy,lambada_openai", "--data-dir", data, cache]
    value = report(cli, long_llama, "--baseline", long_llama, *options)
    assert {row["verdict"] for row in value["rows"]} == {"identical"}
    assert {row["paired"]["difference"] for row in value["rows"]} == {0}
    cached = [task["cached"] for task in value["model"]["tasks"]]
    assert cached == [cache == "--cache"] * 2


def test_models_of_one_name_have_columns_of_their_own(cli: Cli, long_llama, data, tmp_path):
    copy = tmp_path / "copy" / long_llama.name
    shutil.copytree(long_llama, copy)
    options = ["--tasks", "arc_easy", "--data-dir", data, "--limit", "2", "--markdown", "-"]
    done = cli("eval", copy, "--baseline", long_llama, *options)
    assert done.code == 0, done.err
    name = long_llama.name
    header, _, row, *_ = done.out.splitlines()
    assert f" {name} (baseline) | {name} | difference | p | verdict |" in header
    assert header.count("|") == row.count("|")
    assert f"\n- {name} (baseline): " in done.out
    table = cli("eval", copy, "--baseline", long_llama, *options[:-2]).out
    assert "(baseline)" in table.partition("arc_easy")[0]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("option", ["--json", "--markdown"])
def test_missing_folder_of_a_result_is_found_first(cli: Cli, long_llama, data, tmp_path, option):
    target = tmp_path / "nothing" / "x"
    done = cli("eval", long_llama, "--tasks", "arc_easy", "--data-dir", data, option, target)
    assert (done.code, done.out) == (1, "")
    assert "there is no folder" in done.err


def test_group_pools_its_subjects(cli: Cli, long_llama, long_checkpoint):
    options = ["--tasks", "mmlu", "--data-dir", SAMPLE, "--num-fewshot", "1"]
    value = report(cli, long_checkpoint, "--baseline", long_llama, *options)
    rows = {row["task"]: row for row in value["rows"]}
    assert rows["mmlu"]["num_items"] == rows["mmlu"]["paired"]["items"] == 61
    parts = ["mmlu_stem", "mmlu_humanities", "mmlu_social_sciences", "mmlu_other"]
    assert sum(rows[part]["num_items"] for part in parts) == 61
    assert {name for name, row in rows.items() if row["headline"]} == {"mmlu", *parts}
    assert rows["mmlu_astronomy"]["num_items"] == 3
    assert rows["mmlu_astronomy"]["shots"] == 1
    done = cli("eval", long_checkpoint, "--baseline", long_llama, *options)
    assert "mmlu_stem" in done.out
    assert "mmlu_astronomy" not in done.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks", "arc_eazy"], ["no task, group or tag 'arc_eazy'", "Did you mean arc_easy"]),
        (["--tasks", "arc_easy,xyzzy12345"], ["'xyzzy12345'", "`lm-eval ls tasks` lists all"]),
        (["--tasks", ","], ["No task is named"]),
        (
            ["--tasks", "arc_easy"],
            ["arc_easy/test.jsonl (or .jsonl.gz), which isn't there", "datasets.json"],
        ),
        (["--tasks", "humaneval"], ["humaneval: runs programs", "--confirm-run-unsafe-code"]),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_mistake_is_one_short_line(cli: Cli, long_llama, options, words):
    done = cli("eval", long_llama, *options, "--data-dir", SAMPLE)
    assert (done.code, done.out) == (1, "")
    (line,) = done.said
    assert line.startswith("Error: ")
    assert len(line) < 400
    for word in words:
        assert word in line


def test_missing_data_folder_is_one_line(cli: Cli, long_llama, tmp_path):
    done = cli("eval", long_llama, "--tasks", "arc_easy", "--data-dir", tmp_path / "nothing")
    assert (done.code, done.out) == (1, "")
    assert "There is no data folder" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "3"], "--limit needs --tasks"),
        (["--data-dir", "x"], "--data-dir needs --tasks"),
        (["--no-cache"], "--no-cache needs --tasks"),
        (["--markdown", "x.md"], "--markdown needs --tasks"),
        (["--confirm-run-unsafe-code"], "--confirm-run-unsafe-code needs --tasks"),
        (["--tasks", "arc_easy", "--windows", "3"], "--windows goes without --tasks"),
        (["--tasks", "arc_easy", "--dataset", "x"], "--dataset goes without --tasks"),
        (["--tasks", "arc_easy", "--limit", "0"], "--limit"),
        (["--tasks", "arc_easy", "--batch-size", "0"], "--batch-size is '0'"),
        (["--tasks", "arc_easy", "--json", "-", "--markdown", "-"], "stdout takes one"),
    ],
)
def test_option_that_would_be_ignored_is_a_usage_error(cli: Cli, llama: Path, options, message):
    done = cli("eval", llama, *options)
    assert (done.code, done.out) == (2, "")
    assert message in " ".join(re.sub("[│╭╮╰╯─]", " ", done.err).split())


def test_without_lm_eval_the_extra_is_named(cli: Cli, llama, monkeypatch):
    import importlib.util

    shipped = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "lm_eval" else shipped(name, *rest),
    )
    done = cli("eval", llama, "--tasks", "arc_easy")
    assert done.code == 1
    assert "needs the 'eval' extra. Run: pip install" in done.err
