"""`--kv-cache` of the commands: it reaches what runs the model, and the result says so."""

import io
import json
import shutil

import pytest

from qtool.integrations.transformers import int8_cache
from qtool.runtime.decode.cache import quantized_rows, wanted_kv_cache
from tests.cli.conftest import Cli
from tests.cli.test_bench_gpu import SMALL, _imagined_card  # noqa: F401 - a fixture
from tests.unit.timing.rig import TINY


@pytest.fixture
def own(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "own")


def test_eval_says_what_the_cache_costs(cli: Cli, own, text_file):
    options = ["--dataset", text_file, "--context-length", 64, "--windows", 2, "--no-texts"]
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    line = ("eval", own, "--baseline", own, *options, "--kv-cache", "int8")
    done = cli(*line, "--json", "-")
    assert done.code == 0, done.err
    value = json.loads(done.out)
    kinds = [one["perplexity"]["kv_cache"] for one in value["figures"]]
    assert kinds == ["auto", "int8"]
    assert 0 < value["agreement"]["kl_divergence"] < 0.01
    assert "sees its keys and values as int8" in cli(*line).out
    after = {path.name: path.read_bytes() for path in own.iterdir()}
    assert after == before, "what a card says is of the checkpoint with the cache as it is"
    assert wanted_kv_cache() == "auto"
    plain = cli("eval", own, "--baseline", own, *options, "--json", "-")
    assert json.loads(plain.out)["agreement"]["kl_divergence"] == 0


@pytest.mark.usefixtures("_imagined_card")
def test_bench_says_what_a_token_takes(cli: Cli):
    options = (*SMALL, "--kv-cache", "int8", "--json", "-")
    done = cli("bench", "--synthetic", "llama3-8b", *options)
    assert done.code == 0, done.err
    sizes = TINY.decoder
    assert sizes is not None
    numbers = 2 * sizes.num_layers * sizes.num_key_value_heads
    for model in json.loads(done.out)["end_to_end"]:
        assert model["kv_cache"] == "int8"
        assert model["kv_cache_bytes_per_token"] == numbers * (sizes.head_dim + 4)


def test_chat_talks_with_it(cli: Cli, chat_llama, monkeypatch):
    seen = []

    def rows(x):
        seen.append(x.shape)
        return quantized_rows(x)

    monkeypatch.setattr(int8_cache, "quantized_rows", rows)
    for options, used in ((["--kv-cache", "int8"], True), ([], False)):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        done = cli("chat", chat_llama, "--max-tokens", 2, *options)
        assert done.code == 0, done.err
        assert bool(seen) is used
        seen.clear()


@pytest.mark.parametrize("command", ["eval", "serve", "chat", "bench"])
def test_other_caches_are_usage_errors(cli: Cli, command):
    done = cli(command, "MODEL", "--kv-cache", "int4")
    assert done.code == 2
    assert "auto" in done.err
    assert "int8" in done.err
