"""quantize, inspect, eval and bench of a tiny llama, as a user calls them."""

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qtool.checkpoint.reader import CheckpointReader, tensor_digest
from tests.cli.conftest import Cli
from tests.helpers import QUICK_BCQ
from tests.robustness.gguf_files import write_gguf


def quantized(cli: Cli, llama, out_dir, *options):
    done = cli("quantize", *options, llama, out_dir)
    assert done.code == 0, done.err
    return done


def test_first_command_of_the_readme_form_works(cli: Cli, llama, tmp_path):
    out_dir = tmp_path / "out"
    options = ["--method", "bcq", "--bits", "3", "--group-size", "32"]
    done = quantized(cli, llama, out_dir, *options)
    assert "bits per weight, with scales" in done.out
    entries = CheckpointReader(out_dir).manifest.layers.values()
    assert {(e.method, e.scheme.num_bits, e.scheme.group_size) for e in entries} == {("bcq", 3, 32)}


@pytest.mark.parametrize(
    ("options", "with_data"),
    [
        (["--method", "bcq"], True),
        (["--method", "gptq"], True),
        (["--method", "bcq", "--no-calibration"], False),
        (["--method", "rtn"], False),
        (["--recipe", "bcq-w4g128-data-free"], False),
    ],
)
def test_data_is_drawn_where_a_method_does_better_with_it(
    cli: Cli, llama, tmp_path, options, with_data
):
    few = ["--set", "calibration.num_samples=4"] if with_data else []
    quantized(cli, llama, tmp_path / "out", "--group-size", "32", *options, *few)
    assert bool(CheckpointReader(tmp_path / "out").manifest.calibration) == with_data


SHORT = ("calibration.num_samples=12", "calibration.sequence_length=32")
TUNED = (
    *SHORT,
    *(f"tuning.blocks.{key}" for key in ("steps=4", "code_rate=0.02")),
    *(f"tuning.end_to_end.{key}" for key in ("steps=4", "batch_size=2", "sequence_length=32")),
)


def settings(*texts):
    return [word for text in texts for word in ("--set", text)]


@pytest.mark.parametrize(
    ("tune", "parts"),
    [
        (None, {"blocks", "model"}),
        ("both", {"blocks", "model"}),
        ("blocks", {"blocks"}),
        ("end-to-end", {"model"}),
        ("none", set()),
    ],
)
def test_tune_says_what_gradients_improve(cli: Cli, llama, text_file, tmp_path, tune, parts):
    chosen = () if tune is None else ("--tune", tune)
    quick = f"weights.options={json.dumps(QUICK_BCQ)}"
    keys = settings(*TUNED, quick, f"calibration.dataset={text_file}")
    options = ("--method", "bcq", "--group-size", "32", "--no-check", *keys, *chosen)
    done = quantized(cli, llama, tmp_path / "out", *options)
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert set(report["tuning"]) == parts
    assert all(now <= was for was, now in report["tuning"].values())
    assert all(f"tuned {part}" in done.out for part in parts)
    curves = tmp_path / "out" / "tuning.jsonl"
    assert curves.exists() == bool(parts)
    if parts:
        lines = [json.loads(line) for line in curves.read_text().splitlines()]
        assert {line["of"] for line in lines} == {
            *(["model"] if "model" in parts else []),
            *(["model.layers.0", "model.layers.1"] if "blocks" in parts else []),
        }
        assert "tuning.jsonl" in report["files"]
    again = cli("quantize", *options, "--overwrite", llama, tmp_path / "out")
    assert again.code == 0, again.err


def test_tune_that_is_none_is_told_the_choices(cli: Cli, llama, tmp_path):
    done = cli("quantize", "--tune", "all", llama, tmp_path / "out")
    assert done.code == 2
    assert all(name in done.err for name in ("none", "blocks", "end-to-end", "both"))


def test_what_tuning_gained_is_drawn(cli: Cli, llama, text_file, tmp_path):
    keys = settings(*TUNED, f"calibration.dataset={text_file}")
    options = ("--method", "rtn", "--group-size", "32", "--no-check", *keys)
    quantized(cli, llama, tmp_path / "out", *options)
    plot = tmp_path / "curves.svg"
    done = cli("inspect", tmp_path / "out", "--plot", plot)
    assert done.code == 0, done.err
    assert plot.read_bytes().startswith(b"<?xml")


def test_a_plot_that_cannot_be_drawn_is_refused(cli: Cli, checkpoint, tmp_path):
    done = cli("inspect", checkpoint, "--plot", tmp_path / "curves.svg")
    assert done.code == 1
    assert "nothing was tuned" in done.err
    assert cli("inspect", checkpoint, "--plot", tmp_path / "curves.txt").code == 2
    assert not list(tmp_path.glob("curves.*"))


def test_tuning_without_data_is_refused(cli: Cli, llama, tmp_path):
    done = cli("quantize", "--tune", "blocks", "--no-calibration", llama, tmp_path / "out")
    assert done.code == 1
    assert "tuning needs calibration data" in done.err


def test_rounding_is_tuned_with_data_of_its_own(cli: Cli, llama, tmp_path):
    options = ("--method", "rtn", "--bits", "3", "--group-size", "32", "--tune", "blocks")
    done = quantized(cli, llama, tmp_path / "out", *options, *settings(*TUNED[:4]))
    assert "tuned blocks" in done.out


def test_strict_is_a_key_of_the_recipe(cli: Cli, llama, tmp_path):
    options = ["--method", "gptq", "--strict", "--set", "calibration.num_samples=4"]
    quantized(cli, llama, tmp_path / "out", *options)
    assert CheckpointReader(tmp_path / "out").manifest.recipe["calibration"]["strict"] is True


def test_options_lie_over_the_recipe_and_set_lies_over_it_too(cli: Cli, llama, tmp_path):
    options = ["--recipe", "rtn-w4g128", "--bits", "6", "--group-size", "row"]
    setting = ["--set", "weights.scheme.symmetric=true"]
    quantized(cli, llama, tmp_path / "out", *options, *setting)
    for entry in CheckpointReader(tmp_path / "out").manifest.layers.values():
        scheme = entry.scheme
        assert (scheme.num_bits, scheme.group_size, scheme.symmetric) == (6, None, True)


def test_recorded_recipe_reproduces_the_checkpoint(cli: Cli, llama, tmp_path):
    import yaml

    quantized(cli, llama, tmp_path / "a", "--method", "rtn", "--bits", "5", "--set", "seed=3")
    recipe = CheckpointReader(tmp_path / "a").manifest.recipe
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(dict(recipe)))
    quantized(cli, llama, tmp_path / "b", "--recipe", tmp_path / "r.yaml")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_dry_run_prints_the_sizes_that_the_run_then_has(cli: Cli, llama, tmp_path):
    options = ["--recipe", "rtn-w4g128", "--json", "-"]
    planned = json.loads(quantized(cli, llama, tmp_path / "out", *options, "--dry-run").out)
    assert not (tmp_path / "out").exists()
    result = json.loads(quantized(cli, llama, tmp_path / "out", *options).out)
    assert planned["total_bytes"] == result["weight_bytes"]
    assert planned["average_bits"] == result["average_bits"]
    assert len(planned["layers"]) == len(result["layers"]) == 14


def test_dry_run_prints_a_table(cli: Cli, llama, tmp_path):
    done = quantized(cli, llama, tmp_path / "out", "--dry-run")
    assert "nothing was written" in done.out
    assert "model.layers.0-1.mlp.down_proj" in done.out
    assert list(tmp_path.iterdir()) == []


def test_json_to_stdout_is_nothing_but_json(cli: Cli, checkpoint):
    manifest = json.loads(cli("inspect", checkpoint, "--json", "-").out)
    assert manifest["quant_method"] == "qtool"
    assert len(manifest["layers"]) == 14
    assert manifest["average_bits"] == pytest.approx(4 + 20 / 32)


def test_classes_of_rows_are_listed_and_add_up(cli: Cli, mixed_tables):
    done = cli("inspect", mixed_tables, "--layers")
    assert done.code == 0, done.err
    assert "mixed_rows 8/5/4/3/2/1 bit" in done.out
    assert "Rows of model.embed_tokens" in done.out
    shared = "as model.embed_tokens" in done.out
    assert ("Rows of lm_head" in done.out) == (not shared)
    assert re.search(r"all\W+96\W+6,144\W+3,684\W+4\.80", done.out), "the bytes of its parts"
    assert "keys and values there, per 1,000 tokens" in done.out


def test_memory_on_a_card_is_in_the_json(cli: Cli, checkpoint):
    memory = json.loads(cli("inspect", checkpoint, "--json", "-").out)["on_a_card"]
    assert memory["cache_bytes_per_token"] == 256
    assert memory["weight_bytes"] > 0


def test_json_to_a_file_leaves_the_table_on_stdout(cli: Cli, checkpoint, tmp_path):
    done = cli("inspect", checkpoint, "--json", tmp_path / "m.json")
    assert "bits per weight" in done.out
    assert json.loads((tmp_path / "m.json").read_text())["format_version"] == 1


def test_inspect_lists_every_layer_if_asked(cli: Cli, checkpoint):
    assert "q_proj" not in cli("inspect", checkpoint).out
    listed = cli("inspect", checkpoint, "--layers").out
    assert len(re.findall(r"model\.layers\.\d\.\S+_proj", listed)) == 14


def test_inspect_verifies_what_it_has_digests_of(cli: Cli, checkpoint, tmp_path):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    config = json.loads((copy / "config.json").read_text())
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    config["quantization_config"]["digests"] = digests
    (copy / "config.json").write_text(json.dumps(config))
    assert (
        f"{len(digests)} tensors are as they were written" in cli("inspect", copy, "--verify").out
    )
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert cli("inspect", copy).code == 0
    done = cli("inspect", copy, "--verify")
    assert done.code == 1
    assert "model.norm.weight isn't what was written" in done.err


def test_eval_puts_the_baseline_first(cli: Cli, llama, checkpoint, text_file):
    options = ["--dataset", text_file, "--context-length", "64", "--windows", "3"]
    done = cli("eval", checkpoint, "--baseline", llama, *options, "--json", "-")
    assert done.code == 0, done.err
    first, second = json.loads(done.out)["figures"]
    assert (first["name"], second["name"]) == (llama.name, checkpoint.name)
    assert first["average_bits"] == 16
    assert second["average_bits"] == pytest.approx(4 + 20 / 32)
    assert second["perplexity"]["windows"] == 3
    ratio = second["perplexity"]["perplexity"] / first["perplexity"]["perplexity"]
    assert ratio == pytest.approx(1, abs=0.1)
    assert second["weight_bytes"] < first["weight_bytes"]


def test_eval_prints_what_the_number_holds_for(cli: Cli, checkpoint, text_file):
    options = ["--dataset", text_file, "--context-length", "64", "--windows", "2"]
    done = cli("eval", checkpoint, *options, "--backend", "reference")
    assert done.code == 0, done.err
    assert "words.txt, first 2 of 9 windows of 64 tokens, float32 on" in done.out


def test_backends_agree_on_the_perplexity(cli: Cli, checkpoint, text_file):
    options = ["--dataset", text_file, "--context-length", "64", "--windows", "2", "--json", "-"]
    values = [
        json.loads(cli("eval", checkpoint, *options, "--backend", name).out)
        for name in ("reference", "dense")
    ]
    first, second = (value["figures"][0]["perplexity"]["perplexity"] for value in values)
    assert first == pytest.approx(second, rel=1e-4)


def test_bench_times_the_checkpoint_beside_its_original(cli: Cli, llama, checkpoint):
    done = cli("bench", checkpoint, "--baseline", llama, "--backend", "dense", "--json", "-")
    assert done.code == 0, done.err
    figures = json.loads(done.out)["figures"]
    assert [figure["name"] for figure in figures] == [llama.name, checkpoint.name]
    assert [figure["speed"]["backends"] for figure in figures] == [[], ["dense"]]
    for figure in figures:
        assert figure["speed"]["prefill_tokens_per_second"] > 0
        assert figure["speed"]["decode_tokens_per_second"] > 0


def test_bench_prints_its_conditions(cli: Cli, checkpoint):
    done = cli("bench", checkpoint)
    assert done.code == 0, done.err
    assert re.search(r"batch 1, prompt 256, 32 tokens decoded,\s+median of 5", done.out)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("methods", ["rtn:", "meaning", "8 bits; takes calibra", "Fraction of the group"]),
        ("recipes", ["rtn-w4g128", "bcq-w3g128"]),
        ("doctor", ["torch", "reference", "runs, priority", "Extras", "ray"]),
    ],
)
def test_lists_are_printed(cli: Cli, command, words):
    done = cli(command)
    assert done.code == 0
    for word in words:
        assert word in done.out


def test_progress_and_errors_stay_out_of_stdout(cli: Cli, llama, tmp_path):
    done = quantized(cli, llama, tmp_path / "out", "--method", "rtn", "--json", "-")
    json.loads(done.out)


def test_a_gguf_file_is_quantized(cli: Cli, tmp_path):
    file, out_dir = tmp_path / "tiny.gguf", tmp_path / "out"
    write_gguf(file)
    quantized(cli, file, out_dir, "--method", "rtn", "--group-size", "row")
    assert CheckpointReader(out_dir).manifest.layers
