"""What arguments alone show to be wrong is refused before a model is converted, read or fetched."""

import json
import sys

import pytest

from qtool.modeling import locate
from qtool.pipeline import adapt as adapting
from qtool.pipeline import written
from tests.cli.conftest import Cli
from tests.robustness.gguf_files import write_gguf

NEVER = (
    "quantize {m} {there}",
    "quantize {m} {m}",
    "quantize {m} {out} --method awq",
    "quantize {m} {out} --method rtn --set fold.name=rtn --set calibration.num_samples=2",
    "quantize {m} {out} --method gptq --no-calibration",
    "quantize {m} {out} --method sparse_bcq --bits 8",
    "quantize {m} {out} --method rtn --set embedding.method=gptq",
    "quantize {m} {out} --set weights.options.clip_rato=1",
    "quantize {m} {out} --set calibration.dataset=nothing.txt",
    "quantize {m} {out} --set calibration.dataset=hub:a:b:c",
    "quantize {m} {out} --method rtn --engine ray",
    "quantize {m} {there}/x --sweep average_bits=3,4",
    "import {m} {there}",
    "run ci/smoke {m} {there}",
    "calibrate {m} {there}/x",
    "calibrate {m} {there}/x/y",
    "eval {m} --tasks arc_easy",
    "eval {m} --pairs nothing.jsonl",
    "eval {m} --pairs {data}",
    "eval {m} --dataset nothing.txt",
    "eval {m} --dataset wikitext",
    "compare {m} {m} --dataset nothing.jsonl",
    "compare {m} {m} --no-texts --tasks arc_easy",
    "grid {out} --model {m} --dataset nothing.txt",
    "grid {there}/x --model {m} --recipe ci/smoke",
    "bench {m} --baseline {m} --gguf nothing.gguf",
    "bench {m} --baseline {m} --gguf {m}",
    "train {m} {data} {there} --recipe train-w2-pnr",
)
MISSING = ("ray", "lm_eval", "sacrebleu", "rouge_score", "datasets", "llama_cpp")


@pytest.mark.parametrize("command", NEVER)
def test_a_model_is_not_touched_for_a_wrong_request(cli: Cli, tmp_path, monkeypatch, command):
    write_gguf(tmp_path / "m.gguf")
    places = {"m": tmp_path / "m.gguf", "there": tmp_path / "there", "out": tmp_path / "out"}
    places["data"] = tmp_path / "data.jsonl"
    places["data"].write_text('{"prompt": "a", "completion": "b"}\n')
    places["there"].mkdir()
    (places["there"] / "x").write_text("somebody's")
    for name in MISSING:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(locate, "convert_gguf", lambda *_: pytest.fail("the model is converted"))
    monkeypatch.chdir(tmp_path)
    done = cli(*command.format(**places).split())
    assert done.code == 1, done.err
    assert len(done.said) == 1
    assert "Internal" not in done.said[0]
    assert not places["out"].exists()


BAD_LINES = {
    "no prompt": ('{"text": "a"}\n', "has no prompts"),
    "no lines": ("", "has n"),
    "half a line": ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n', "line 2"),
    "no completion": ('{"prompt": "a"}\n', "'completion'"),
    "a chat without roles": ('{"messages": [{"content": "a"}]}\n', "'role'"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_lines_are_read_before_the_model(cli: Cli, tmp_path, monkeypatch, name):
    pytest.importorskip("sacrebleu")
    write_gguf(tmp_path / "m.gguf")
    content, words = BAD_LINES[name]
    (tmp_path / "data.jsonl").write_text(content)
    monkeypatch.setattr(locate, "convert_gguf", lambda *_: pytest.fail("the model is converted"))
    monkeypatch.chdir(tmp_path)
    commands = [("eval", "m.gguf", "--pairs", "data.jsonl")]
    commands += [("adapt", "m.gguf", "data.jsonl", "out")] * (name != "no prompt")
    for command in commands:
        done = cli(*command)
        assert (done.code, len(done.said)) == (1, 1), done.err
        assert words in done.said[0]


def test_a_chat_that_a_template_refuses_is_told_before_any_model_is_loaded(
    cli: Cli, llama, chat_llama, tmp_path, monkeypatch
):
    pytest.importorskip("sacrebleu")
    data = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
    data.write_text(json.dumps({"messages": turns}))
    monkeypatch.setattr(written, "load_model", lambda *_a, **_k: pytest.fail("loaded"))
    done = cli("eval", llama, "--baseline", chat_llama, "--pairs", data)
    assert done.code == 1
    assert "has no chat template" in done.said[-1]


def test_what_nobody_has_quantized_is_refused_before_it_is_loaded(
    cli: Cli, llama, tmp_path, monkeypatch
):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.setattr(adapting, "load_model", lambda *_a, **_k: pytest.fail("loaded"))
    done = cli("adapt", llama, data, tmp_path / "adapter")
    assert done.code == 1
    assert "isn't quantized" in done.said[-1]
