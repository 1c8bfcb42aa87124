"""`qtool run` as a user calls it: exit codes, files, what is refused before anything is done."""

import json
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml

from qtool.timing import decode, gpu, machine
from tests import families
from tests.cli.conftest import Cli
from tests.unit.timing.rig import bench

WINDOWS = {"windows": 2, "context_length": 40}


@pytest.fixture
def recipe(chat_llama, text_file, tmp_path):
    """Return a function that writes a recipe with some gates, and its path."""

    def write(gates, **sections):
        values = {
            "version": 1,
            "weights": {"method": "rtn", "scheme": {"num_bits": 4, "group_size": 32}},
            "model": str(chat_llama),
            "eval": {"dataset": str(text_file), **WINDOWS},
            "gates": gates,
            **sections,
        }
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


def test_passed_run_exits_with_0_and_writes_what_is_asked(cli: Cli, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--json", "r.json", "--junit", "r.xml", "--markdown", "r.md")
    done = cli("run", recipe({"kl_mean": 1, "average_bits": 5}), *options)
    assert done.code == 0, done.err
    assert (tmp_path / "mine" / "config.json").is_file(), "OUT_DIR is named as the recipe"
    for word in ("gates.kl_mean (chats)", "at most 5", "passed", "all 3 gates. All results are in"):
        assert word in done.out
    assert json.loads((tmp_path / "r.json").read_text())["passed"] is True
    assert len(ElementTree.parse(tmp_path / "r.xml").findall(".//testcase")) == 3
    assert (tmp_path / "r.md").read_text().startswith("- **mine.yaml: passed**\n")
    again = cli("run", tmp_path / "mine.yaml", *options)
    assert again.code == 0, again.err
    assert "Kept from an earlier run: text." in again.out


def test_failed_gate_exits_with_3_and_one_line(cli: Cli, recipe, chat_llama, tmp_path):
    out_dir = tmp_path / "out"
    done = cli("run", recipe({"kl_mean": 1e-9, "same_token": 0.1}), chat_llama, out_dir)
    assert done.code == 3
    rows = [line for line in done.out.splitlines() if "FAILED" in line]
    assert len(rows) == 2
    assert "Failed: gates.kl_mean (text), gates.kl_mean (chats)." in done.out
    assert done.said == []
    assert (out_dir / "run" / "text.json").is_file()
    lifted = cli("run", tmp_path / "mine.yaml", chat_llama, out_dir, "--set", "gates.kl_mean=null")
    assert lifted.code == 0


def test_json_to_stdout_is_nothing_but_json(cli: Cli, recipe, tmp_path):
    done = cli("run", recipe({"bytes": 1}), "--set", "eval=null", "--json", "-", tmp_path / "out")
    assert done.code == 1  # that is MODEL
    model = yaml.safe_load((tmp_path / "mine.yaml").read_text())["model"]
    arguments = ("--set", "eval=null", "--json", "-", model, tmp_path / "out")
    done = cli("run", tmp_path / "mine.yaml", *arguments)
    assert done.code == 3
    assert [line["gate"] for line in json.loads(done.out)["gates"]] == ["gates.bytes"]


@pytest.mark.parametrize(
    ("gates", "settings", "words"),
    [
        ({"kl_men": 1}, (), "Did you mean 'kl_mean'?"),
        ({"kl_mean": "much"}, (), "gates.kl_mean is 'much'"),
        ({"kl_mean": 1}, ("eval=null",), "gates.kl_mean needs a section 'eval'"),
        ({"decode_ratio": 1}, (), "gates.decode_ratio needs a section 'bench'"),
        ({}, ("check.max_klx=1",), "Did you mean 'max_kl'?"),
        ({}, ("eval.dataset=no-such.txt",), "no-such.txt"),
        ({}, ("eval.chats=no-such.jsonl",), "no-such.jsonl"),
        ({}, ("bench={gpu: true}",), "needs a CUDA card"),
        ({}, ("model=null",), "names no model"),
    ],
)
def test_wrong_request_is_one_sentence_before_anything_runs(
    cli: Cli, recipe, tmp_path, monkeypatch, gates, settings, words
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    path = recipe(gates)
    done = cli("run", path, *(word for text in settings for word in ("--set", text)))
    assert done.code == 1
    assert len(done.said) == 1
    assert words in done.said[0]
    assert [one.name for one in tmp_path.iterdir() if one != path] == []


def test_unreadable_recipes_are_refused(cli: Cli, tmp_path):
    (tmp_path / "broken.yaml").write_text("weights: {method: rtn\n")
    done = cli("run", tmp_path / "broken.yaml", "model", "out")
    assert (done.code, len(done.said)) == (1, 1)
    assert "broken.yaml line" in done.said[0]
    assert cli("run", tmp_path / "none.yaml", "model", "out").code == 1
    assert "Did you mean 'ci/smoke'?" in cli("run", "ci/smok", "model", "out").err


def test_dry_run_prints_steps_and_gates_and_writes_nothing(cli: Cli, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli("run", recipe({"same_token": 0.5}), "--dry-run")
    assert done.code == 0, done.err
    for word in ("14 layers", "context_length=40", "same_token", "at least", "Nothing was written"):
        assert word in done.out
    assert not (tmp_path / "mine").exists()
    report = json.loads(cli("run", tmp_path / "mine.yaml", "--dry-run", "--json", "-").out)
    assert report["gates"] == {"same_token": 0.5}


def test_without_gates_the_figures_are_printed(cli: Cli, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli("run", recipe({}))
    assert done.code == 0, done.err
    assert "closeness.text.kl_mean" in done.out


def test_check_of_quantize_exits_with_3_and_inspect_says_it(cli: Cli, recipe, chat_llama, tmp_path):
    path = recipe({}, check={"max_kl": 1e-9, **WINDOWS})
    done = cli("quantize", "--recipe", path, chat_llama, tmp_path / "out")
    assert done.code == 3
    assert "check.max_kl (text)" in done.out
    assert "FAILED" in done.out
    shown = cli("inspect", tmp_path / "out")
    assert shown.code == 0
    assert "check after writing" in shown.out
    assert "FAILED: check.max_kl (text)" in " ".join(shown.out.replace("│", " ").split())
    mark = json.loads(cli("inspect", tmp_path / "out", "--json", "-").out)["check"]
    assert mark["passed"] is False
    options = ("--resume", "--set", "check.max_kl=5", "--json", "-")
    again = cli("quantize", "--recipe", path, *options, chat_llama, tmp_path / "out")
    assert again.code == 0, again.err
    assert [line["passed"] for line in json.loads(again.out)["budgets"]] == [True, True]
    assert "passed" in cli("inspect", tmp_path / "out").out


def test_quantize_without_budgets_reports_as_before(cli: Cli, llama, checkpoint, tmp_path):
    done = cli("quantize", "--method", "rtn", "--json", "-", llama, tmp_path / "out")
    assert "budgets" not in json.loads(done.out)
    assert "check" not in json.loads(cli("inspect", checkpoint, "--json", "-").out)


ON_A_CARD = ("bench={gpu: true}", "gates={copy_share: 0, card_memory: 1.0e+12, decode_ratio: 0}")


def timed_on_a_card(cli: Cli, path, model, out_dir):
    """Return the lines of gates whose figures a card gives."""
    settings = (word for text in ON_A_CARD for word in ("--set", text))
    done = cli("run", path, model, out_dir, *settings, "--json", "-")
    assert done.code == 0, done.err + done.out
    lines = {line["gate"]: line for line in json.loads(done.out)["gates"]}
    assert set(lines) == {"gates.copy_share", "gates.card_memory", "gates.decode_ratio"}
    return lines


def test_kernels_are_timed_and_judged(cli: Cli, recipe, chat_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "require_card", lambda: torch.device("cpu"))
    monkeypatch.setattr(gpu, "on_card", lambda _device, _kernel: bench())
    monkeypatch.setattr(decode, "REPEATS", 1)
    lines = timed_on_a_card(cli, recipe({}, eval=None), chat_llama, tmp_path / "out")
    assert lines["gates.decode_ratio"]["value"] > 0
    assert lines["gates.copy_share"]["value"] > 0


@pytest.mark.gpu
def test_kernels_of_a_card_are_timed_and_judged(cli: Cli, recipe, tmp_path):
    sizes: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "max_position_embeddings": 2048,
    }
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4}
    model = families.build("llama", **sizes)
    model.save_pretrained(tmp_path / "model")
    families.save_tokenizer(tmp_path / "model")
    lines = timed_on_a_card(cli, recipe({}, eval=None), tmp_path / "model", tmp_path / "out")
    assert lines["gates.card_memory"]["value"] > 0
    assert 0 < lines["gates.copy_share"]["value"] < 2
