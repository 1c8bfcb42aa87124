"""`qtool bench --gpu` as a user calls it, on a card that isn't there; on a real one if marked."""

import json
import re
from dataclasses import replace

import pytest
import torch

from qtool.runtime.backends.cuda.selection import selection_for
from qtool.scheme import Shape2D
from qtool.timing import decode, gpu, machine, quantized_inputs, shapes, tune
from tests.cli.conftest import Cli
from tests.cli.test_errors import one_line
from tests.unit.timing.rig import MACHINE, TINY, bench

SMALL = ("--bits", 2, "--group-size", 32)


@pytest.fixture
def _imagined_card(monkeypatch):
    monkeypatch.setattr(machine, "require_card", lambda: torch.device("cpu"))
    monkeypatch.setattr(gpu, "on_card", lambda _device, _kernel: bench())
    monkeypatch.setattr(decode, "REPEATS", 1)
    monkeypatch.setitem(shapes.MODELS, "llama3-8b", TINY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
@pytest.mark.parametrize("shape", [[], ["--synthetic", "llama3-8b"]])
def test_without_a_card_one_line_says_what_to_do(cli: Cli, checkpoint, shape):
    arguments = shape or [checkpoint, "--gpu"]
    one_line(cli("bench", *arguments), "CUDA card", "without --gpu")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "OUT_DIR"),
        (["--gpu"], "--synthetic NAME"),
        (["out", "--synthetic", "llama3-8b"], "OUT_DIR doesn't go"),
        (["out", "--bits", 2], "--bits needs --synthetic"),
        (["out", "--gpu", "--group-size", 64], "--group-size needs --synthetic"),
        (["out", "--gpu", "--input-bits", 8], "--input-bits needs --synthetic"),
        (["out", "--kernel", "lut"], "--kernel needs --gpu"),
        (["out", "--peers"], "--peers needs --gpu"),
        (["out", "--kv-cache", "int8"], "--kv-cache needs --gpu"),
        (["out", "--plot", "a.png"], "--plot needs --gpu"),
        (["out", "--gpu", "--plot", "a.pdf"], ".png or .svg"),
        (["out", "--gpu", "--backend", "cuda"], "--backend doesn't go"),
        (["out", "--gpu", "--perplexity-windows", 2], "--perplexity-windows doesn't go"),
        (["--synthetic", "llama3-8b", "--bits", 9], "--bits"),
        (["out", "--gpu", "--no-sweep"], "--no-sweep doesn't go with --gpu"),
        (["out", "--no-sweep", "--gguf", "a.gguf"], "--gguf doesn't go with --no-sweep"),
        (["out", "--tune", "--peers"], "OUT_DIR doesn't go with --tune. --peers doesn't go"),
    ],
)
def test_options_that_do_nothing_together_are_usage_errors(cli: Cli, arguments, word):
    done = cli("bench", *arguments)
    assert done.code == 2
    assert done.out == ""
    assert "Usage" in done.err
    assert word in " ".join(re.sub(r"[│\s]+", " ", done.err).split())


@pytest.mark.usefixtures("_imagined_card")
def test_shapes_are_timed_without_weights(cli: Cli):
    done = cli("bench", "--synthetic", "llama3-8b", *SMALL)
    assert done.code == 0, done.err
    for text in (
        *("Kernels at one token: llama3-8b", "qtool 2 bit g32, planes", "fp16 cuBLAS"),
        *("Batch sweep: gate_up, 256 x 64", "none up to 64", "llama3-8b, float16"),
        *("Imagined 1, SM 1755 of 1980 MHz, driver 580.1, torch 2.13, CUDA 13.0"),
    ):
        assert text in done.out


@pytest.mark.usefixtures("_imagined_card")
def test_a_card_is_tuned_and_its_table_is_used(cli: Cli, monkeypatch, tmp_path):
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path))
    one = bench()
    named = replace(one.rig, card=one.rig.card._replace(name=MACHINE.card))
    monkeypatch.setattr(gpu, "on_card", lambda _device, _kernel: replace(one, rig=named))
    for name in ("MANY_WEIGHTS", "MANY_INPUTS", "FEW_WEIGHTS"):
        monkeypatch.setattr(tune, name, Shape2D(32, 256))
    monkeypatch.setattr(tune, "TABLE_SHAPES", (Shape2D(32, 256),))
    monkeypatch.setattr(tune, "BLOCKS", (2,))
    done = cli("bench", "--tune")
    path = tmp_path / "tuning" / "imagined-1.json"
    assert done.code == 0, done.err
    for text in ("Timed for the tuning table", "32 x 256", "dequantize", "Imagined 1"):
        assert text in done.out
    assert str(path) in done.out.replace("\n", "")
    assert selection_for("Imagined 1").measured_on == "Imagined 1"
    done = cli("bench", "--tune", "--json", "-")
    report = json.loads(done.out)
    assert report["path"] == str(path)
    saved = json.loads(path.read_text())
    assert report["selection"] == {key: saved[key] for key in saved.keys() - {"version"}}
    assert {trial["kernel"] for trial in report["trials"]} == {"planes", "lut", "dequantize"}


@pytest.mark.usefixtures("_imagined_card")
def test_linears_whose_inputs_are_quantized_are_timed_if_asked(cli: Cli, monkeypatch, tmp_path):
    monkeypatch.setattr(quantized_inputs, "MANY_TOKENS", (1, 16))
    shape, file = ("--synthetic", "llama3-8b", *SMALL), tmp_path / "result.json"
    for options, there in ((["--input-bits", 8], True), ([], False)):
        done = cli("bench", *shape, *options, "--json", file)
        assert done.code == 0, done.err
        assert ("Linears whose inputs are quantized" in done.out) == there
        assert ("8 bit per token" in done.out) == there
        assert ("quantized_inputs" in json.loads(file.read_text())) == there


@pytest.mark.usefixtures("_imagined_card")
def test_a_checkpoint_is_timed_beside_its_original(cli: Cli, llama, checkpoint, tmp_path):
    plot = tmp_path / "roofline.svg"
    options = ["--baseline", llama, "--peers", "--plot", plot, "--json", "-"]
    done = cli("bench", checkpoint, "--gpu", *options)
    assert done.code == 0, done.err
    value = json.loads(done.out)
    assert [layer["name"] for layer in value["layers"]] == ["qkv", "o", "gate_up", "down"]
    assert [model["name"] for model in value["end_to_end"]] == [str(checkpoint), str(llama)]
    assert "pip install gemlite" in value["not_run"]["GemLite 4 bit g128"]
    assert plot.is_file()


@pytest.mark.usefixtures("_imagined_card")
def test_json_goes_to_a_file_beside_the_tables(cli: Cli, checkpoint, tmp_path):
    done = cli("bench", checkpoint, "--gpu", "--json", tmp_path / "result.json")
    assert done.code == 0, done.err
    assert "Break-even" in done.out
    assert json.loads((tmp_path / "result.json").read_text())["name"] == checkpoint.name


@pytest.mark.usefixtures("_imagined_card")
def test_a_family_without_runner_is_told_why(cli: Cli, tiny, tmp_path):
    assert cli("quantize", "--method", "rtn", tiny("opt"), tmp_path / "opt").code == 0
    done = cli("bench", tmp_path / "opt", "--gpu")
    assert done.code == 0, done.err
    assert "Kernels at one token" in done.out
    assert re.search(r"Not timed: end to end: .*opt", done.out)
    assert "decode tokens/s" not in done.out


@pytest.mark.usefixtures("_imagined_card")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--synthetic", "llama3"], ["Did you mean 'llama3-8b'"]),
        (["--synthetic", "llama3-8b", "--kernel", "plane"], ["Did you mean 'planes'"]),
        (["--synthetic", "llama3-8b", "--plot", "no/such/a.png"], ["no folder"]),
    ],
)
def test_unknown_names_are_one_line(cli: Cli, options, words):
    one_line(cli("bench", *options), *words)


@pytest.mark.gpu
def test_tiny_shapes_on_a_card(cli: Cli, monkeypatch, tmp_path):
    larger = shapes.ModelShape(
        tuple(
            shapes.LinearShape(x.name, Shape2D(*(8 * n for n in x.shape)), 2, x.num_bits)
            for x in TINY.linears
        ),
        shapes.DecoderSizes(
            num_layers=2,
            hidden_size=512,
            intermediate_size=1024,
            num_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            vocab_size=768,
            rope_theta=10_000.0,
        ),
    )
    monkeypatch.setitem(shapes.MODELS, "llama3-8b", larger)
    plot = tmp_path / "a.png"
    arguments = ["--synthetic", "llama3-8b", "--bits", 2, "--plot", plot, "--json", "-"]
    done = cli("bench", *arguments)
    assert done.code == 0, done.err
    value = json.loads(done.out)
    assert len(value["end_to_end"]) == 2, value["not_run"]
    for layer in value["layers"]:
        names = [row["what"] for row in layer["rows"]]
        assert names == ["qtool", "fp16 cuBLAS", "tinygemm int4 g128"], layer["failed"]
        assert all(0 < row["microseconds"] < 1e4 for row in layer["rows"])
    assert plot.is_file()
