"""`qtool eval CHECKPOINT --baseline MODEL`: how closely the one follows the other."""

import json
import re
from typing import Any

import pytest

from tests.cli.conftest import Cli


@pytest.fixture
def options(text_file) -> list[Any]:
    return ["--dataset", text_file, "--context-length", "64", "--windows", "3"]


def test_json_has_the_agreement(cli: Cli, llama, checkpoint, options):
    done = cli("eval", checkpoint, "--baseline", llama, *options, "--json", "-")
    assert done.code == 0, done.err
    agreement = json.loads(done.out)["agreement"]
    assert agreement["positions"] == 3 * 63
    assert 0 < agreement["kl_divergence"] < agreement["kl_p99"]
    assert agreement["kl_standard_error"] > 0
    assert 0 < agreement["top1_agreement"] <= 1
    assert agreement["greedy"]
    for text in agreement["greedy"]:
        assert 0 <= text["equal_tokens"] <= text["tokens"]


def test_table_is_followed_by_the_agreement(cli: Cli, llama, checkpoint, options):
    done = cli("eval", checkpoint, "--baseline", llama, *options)
    assert done.code == 0, done.err
    text = " ".join(done.out.split())
    assert "Against the original, 189 predictions: KL divergence 0.0" in text
    assert re.search(r"same likeliest token \d+\.\d ± \d+\.\d %", text)
    assert re.search(r"Greedy continuations of \d+ prompts: the first \d+ % are equal", text)


def test_chats_are_compared_as_well(cli: Cli, chat_llama, checkpoint, options):
    done = cli("eval", checkpoint, "--baseline", chat_llama, *options, "--json", "-")
    value = json.loads(done.out)
    assert value["chats"]["dataset"] == "dialogues-test"
    assert value["chats"]["positions"] == 3 * 63
    assert value["chats"]["greedy"] == []
    assert value["chats"]["kl_divergence"] > 0
    assert value["chats"]["kl_divergence"] != value["agreement"]["kl_divergence"]
    done = cli("eval", checkpoint, "--baseline", chat_llama, *options)
    assert re.search(r"KL, +chats", " ".join(done.out.split()))
    assert "On chats (dialogues-test), 189 predictions: KL divergence 0." in done.out
    text = cli("eval", checkpoint, "--baseline", chat_llama, *options, "--no-chats", "--json", "-")
    assert json.loads(text.out) == {**value, "chats": None}


def test_model_without_a_template_is_compared_on_the_text_alone(
    cli: Cli, llama, checkpoint, options
):
    done = cli("eval", checkpoint, "--baseline", llama, *options)
    assert done.code == 0
    assert f"On chats nothing was compared: {llama.name} has no chat template." in done.out
    assert "KL, chats" not in done.out
    assert "Warning" not in done.err
    quiet = cli("eval", checkpoint, "--baseline", llama, *options, "--no-chats")
    assert "On chats" not in quiet.out


def test_model_agrees_with_itself(cli: Cli, llama, options):
    done = cli("eval", llama, "--baseline", llama, *options, "--json", "-")
    agreement = json.loads(done.out)["agreement"]
    assert agreement["kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert agreement["top1_agreement"] == 1
    assert agreement["greedy_equal_share"] == 1
    assert "original:" not in cli("eval", llama, "--baseline", llama, *options).out


def test_no_more_windows_are_compared_than_there_are(cli: Cli, llama, checkpoint, options):
    done = cli("eval", checkpoint, "--baseline", llama, *options[:4], "--json", "-")
    assert json.loads(done.out)["agreement"]["positions"] == 9 * 63


def test_one_model_alone_agrees_with_nothing(cli: Cli, llama, options):
    value = json.loads(cli("eval", llama, *options, "--json", "-").out)
    assert value["agreement"] is None
    assert len(value["figures"]) == 1
    assert "Against the original" not in cli("eval", llama, *options).out
