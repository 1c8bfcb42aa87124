"""`qtool compare`: any number of models beside the first of them."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from qtool import pipeline
from qtool.modeling.locate import Location
from tests import families
from tests.cli.conftest import Cli
from tests.helpers import recipe


@pytest.fixture
def options(text_file) -> list[Any]:
    return ["--dataset", text_file, "--context-length", "64", "--windows", "5"]


@pytest.fixture(scope="module")
def two_bits(llama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("two") / "checkpoint"
    pipeline.quantize(Location(llama), out_dir, recipe(num_bits=2))
    return out_dir


@pytest.fixture
def report(cli: Cli, options):
    def run(*arguments: Any) -> Any:
        done = cli("compare", *arguments, *options, "--json", "-")
        assert done.code == 0, done.err
        return json.loads(done.out)

    return run


def test_each_model_is_compared_with_the_first(report, llama, checkpoint, two_bits):
    value = report(llama, checkpoint, two_bits)
    first, four, two = value["models"]
    assert [one["label"] for one in value["models"]] == [
        llama.name,
        "checkpoint (1)",
        "checkpoint (2)",
    ]
    assert first["texts"]["text"] is None
    assert first["texts"]["change"] is None
    assert 16 == first["figures"]["average_bits"] < first["strict_bits"] < 17
    assert two["strict_bits"] < four["strict_bits"] < first["strict_bits"]
    divergences = [one["texts"]["text"]["divergence"] for one in (four, two)]
    assert 0 < divergences[0]["mean"]["value"] < divergences[1]["mean"]["value"]
    for one in (four, two):
        block, change = one["texts"]["text"], one["texts"]["change"]
        assert block["positions"] == 5 * 63
        assert 0 < block["gain_rms"]["value"] < 1
        assert 0 <= block["same"]["value"] <= 1
        assert change["paired"]["original"] == first["texts"]["perplexity"]["perplexity"]
        assert change["paired"]["quantized"] == one["texts"]["perplexity"]["perplexity"]
        assert change["paired"]["items"] == 5
        assert math.exp(change["log_ratio"]["value"]) == pytest.approx(change["ratio"]["value"])


def test_figures_are_those_of_eval(cli: Cli, report, llama, checkpoint, options):
    of_compare = report(llama, checkpoint)["models"][1]
    done = cli("eval", checkpoint, "--baseline", llama, *options, "--no-texts", "--json", "-")
    of_eval = json.loads(done.out)
    agreement, block = of_eval["agreement"], of_compare["texts"]["text"]
    assert block["divergence"]["mean"]["value"] == agreement["kl_divergence"]
    assert block["divergence"]["mean"]["standard_error"] == agreement["kl_standard_error"]
    assert block["divergence"]["percentiles"]["99"]["value"] == agreement["kl_p99"]
    assert block["same"]["value"] == agreement["top1_agreement"]
    assert of_compare["texts"]["perplexity"] == of_eval["figures"][1]["perplexity"]


def test_noise_is_the_first_against_itself_in_another_batch(report, llama, checkpoint):
    block = report(llama, checkpoint)["noise"]["text"]
    assert block["batch"] == 2
    assert block["positions"] == 5 * 63
    assert block["divergence"]["maximum"] < 1e-6
    assert block["same"]["value"] == 1
    assert report(llama, checkpoint)["models"][1]["texts"]["text"]["batch"] == 1


def test_tables_have_the_lines_of_llama_perplexity(cli: Cli, chat_llama, checkpoint, options):
    done = cli("compare", chat_llama, checkpoint, *options)
    assert done.code == 0, done.err
    for line in (
        *("Mean PPL(Q)", "Mean ln(PPL(Q)/PPL(base))", "Mean KLD", "Maximum KLD", "99.9% KLD"),
        *("99% KLD", "95% KLD", "90% KLD", "Median KLD", "Minimum KLD", "RMS Δp", "Same top p"),
    ):
        assert line in done.out
    assert "on dialogues-test, " in done.out
    assert re.search(r"Mean KLD +│ +\d\.\d+(e-\d+)? ± \d", done.out)
    assert "(noise)" in done.out


def test_markdown_has_the_tables_and_what_they_hold_for(
    cli: Cli, llama, checkpoint, options, tmp_path
):
    file = tmp_path / "table.md"
    done = cli("compare", llama, checkpoint, *options, "--markdown", file)
    assert done.code == 0, done.err
    text = file.read_text(encoding="utf-8")
    assert text.startswith("| model | bits |")
    assert re.search(r"\n\| Mean KLD \| \d\.\d+(e-\d+)? ± \d", text)
    assert "- Perplexity: words.txt, first 5 of " in text
    assert f"- {llama.name}: {llama.name} has no chat template." in text
    again = cli("compare", llama, checkpoint, *options, "--markdown", file)
    assert again.code == 0, "its own result is replaced"


def test_model_that_cannot_be_compared_costs_no_other(
    cli: Cli, llama, checkpoint, options, tmp_path
):
    larger = tmp_path / "larger"
    families.build("llama", vocab_size=128).save_pretrained(larger)
    families.save_tokenizer(larger)
    done = cli("compare", llama, larger, checkpoint, *options, "--json", "-")
    assert done.code == 0, done.err
    _, other, own = json.loads(done.out)["models"]
    assert other["texts"]["text"] is None
    assert "vocabulary of 128" in other["texts"]["why_not"][0]
    assert own["texts"]["text"] is not None


def test_model_that_cannot_be_loaded_is_said_and_costs_no_other(
    cli: Cli, llama, checkpoint, options, tmp_path
):
    foreign = tmp_path / "foreign"
    shutil.copytree(llama, foreign)
    config = json.loads((foreign / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-nonsense"}
    (foreign / "config.json").write_text(json.dumps(config))
    done = cli("compare", llama, foreign, checkpoint, *options)
    assert done.code == 1
    assert "FAILED: the texts of foreign" in done.out
    assert done.said[-1].startswith("Error: Failed: the texts of foreign.")
    assert "foreign was quantized by another tool, as compressed-nonsense." in done.out
    assert "checkpoint" in done.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "at least two models"),
        (["--no-texts"], "--no-texts needs --tasks"),
        (["--limit", "3"], "--limit needs --tasks"),
        (["--tasks", "arc_easy", "--no-texts", "--windows", "3"], "--windows goes without"),
    ],
)
def test_wrong_request_is_one_sentence(cli: Cli, llama, arguments, words):
    models = [llama] if words.startswith("at least") else [llama, llama]
    done = cli("compare", *models, *arguments)
    assert done.code == 2
    assert words in " ".join(done.err.replace("│", " ").split())
