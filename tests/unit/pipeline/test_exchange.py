"""Export, import, and commands that take what another program has quantized."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import pipeline
from qtool.base import ignore_events
from qtool.checkpoint.reader import CheckpointReader
from qtool.errors import CheckpointError, OutputError, RecipeError
from qtool.exchange._directory import write_directory
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.pipeline import imported
from qtool.pipeline.imported import as_ours
from qtool.runtime.backends._choose import use_backend
from qtool.settings import cache_dir
from tests.helpers import recipe, warnings_in
from tests.unit.exchange.foreign import LAYER

SYMMETRIC = {"num_bits": 4, "group_size": 32, "symmetric": True}


def wanted(**sections):
    chosen = recipe()
    scheme = chosen.weights.scheme.model_copy(update=SYMMETRIC)
    weights = chosen.weights.model_copy(update={"scheme": scheme})
    return chosen.model_copy(update={"weights": weights, **sections})


@pytest.fixture(scope="module")
def symmetric(llama, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("symmetric") / "w4"
    pipeline.quantize(Location(llama), out_dir, wanted())
    return out_dir


@pytest.fixture(scope="module")
def mixed(llama, tmp_path_factory):
    """Return a checkpoint of 4 and 8 bits with one linear left as it is."""
    out_dir = tmp_path_factory.mktemp("mixed") / "w48"
    overrides = [
        {"match": "*.0.mlp.down_proj", "skip": True},
        {"match": "*.mlp.up_proj", "scheme": {"num_bits": 8}},
    ]
    from qtool.recipe.load import recipe_from_mapping

    weights = {"method": "rtn", "scheme": SYMMETRIC, "overrides": overrides}
    pipeline.quantize(Location(llama), out_dir, recipe_from_mapping({"weights": weights}))
    return out_dir


def logits(directory):
    model = load_model(Location(directory), device="cpu", dtype=torch.float32).model
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def section_of(directory):
    return json.loads((directory / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("target", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("source", ["symmetric", "mixed"])
def test_what_is_exported_and_imported_again_is_the_same(target, source, request, tmp_path):
    directory = request.getfixturevalue(source)
    pipeline.export(directory, tmp_path / "out", target)
    result = pipeline.import_model(Location(tmp_path / "out"), tmp_path / "in")
    before, after = CheckpointReader(directory), CheckpointReader(tmp_path / "in")
    assert set(after.names()) == set(before.names())
    for name in before.names():
        one, other = before.load(name), after.load(name)
        if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
            assert isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
            assert torch.equal(one, other)
            continue
        assert (one.format, one.scheme) == (other.format, other.scheme)
        assert all(torch.equal(part, other.parts[key]) for key, part in one.parts.items())
    assert torch.equal(logits(directory), logits(tmp_path / "in"))
    assert result.format == target
    assert after.verify()


def test_configuration_of_gptq_is_what_peers_read(symmetric, mixed, tmp_path):
    pipeline.export(symmetric, tmp_path / "plain", "gptq")
    section = section_of(tmp_path / "plain")
    assert section["quant_method"] == "gptq"
    assert section["checkpoint_format"] == "gptq"
    assert (section["bits"], section["group_size"], section["sym"]) == (4, 32, True)
    assert section["desc_act"] is False
    assert "dynamic" not in section
    modules = section["modules_in_block_to_quantize"]
    assert sorted(modules[0])[0] == "mlp.down_proj"
    assert len(modules[0]) == 7
    pipeline.export(mixed, tmp_path / "mixed", "gptq")
    section = section_of(tmp_path / "mixed")
    assert section["dynamic"] == {
        rf"+:^model\.layers\.{block}\.mlp\.up_proj$": {"bits": 8, "group_size": 32, "sym": True}
        for block in (0, 1)
    }
    assert "model.layers.0.mlp.down_proj" not in section["modules_in_block_to_quantize"][0]
    assert "model.layers.1.mlp.down_proj" in section["modules_in_block_to_quantize"][0]


def test_configuration_of_compressed_tensors_is_what_peers_read(symmetric, mixed, tmp_path):
    pipeline.export(symmetric, tmp_path / "plain", "compressed-tensors")
    section = section_of(tmp_path / "plain")
    assert section["format"] == "pack-quantized"
    assert section["ignore"] == ["lm_head"]
    assert section["config_groups"]["group_0"]["targets"] == ["Linear"]
    pipeline.export(mixed, tmp_path / "mixed", "compressed-tensors")
    section = section_of(tmp_path / "mixed")
    assert section["ignore"] == ["model.layers.0.mlp.down_proj", "lm_head"]
    groups = section["config_groups"].values()
    assert sorted(group["weights"]["num_bits"] for group in groups) == [4, 8]
    assert sum(len(group["targets"]) for group in groups) == 13


def test_a_tied_head_stays_tied(tiny, tmp_path):
    pipeline.quantize(Location(tiny("llama", tied=True)), tmp_path / "w4", wanted())
    for target in ("gptq", "compressed-tensors", "dense"):
        pipeline.export(tmp_path / "w4", tmp_path / target, target)
        again = tmp_path / target
        if target != "dense":
            pipeline.import_model(Location(again), tmp_path / f"{target}-in")
            again = tmp_path / f"{target}-in"
        assert torch.equal(logits(tmp_path / "w4"), logits(again)) or target == "dense"


def test_dense_is_what_the_codes_mean(tiny, tmp_path):
    for family in ("llama", "gpt2"):
        folder = tmp_path / family
        pipeline.quantize(Location(tiny(family)), folder / "w4", wanted())
        pipeline.export(folder / "w4", folder / "dense", "dense", dtype="float32")
        with use_backend("dense"):  # what the codes mean, not what a CPU's tables make of it
            torch.testing.assert_close(logits(folder / "dense"), logits(folder / "w4"))


def test_nothing_is_replaced_and_nothing_is_left(symmetric, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists, and nothing is replaced"):
        pipeline.export(symmetric, tmp_path / "there", "gptq")
    with pytest.raises(OutputError, match="is the model that is read"):
        pipeline.export(symmetric, symmetric / "inside", "gptq")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_what_an_engine_has_no_kernels_for_is_refused(symmetric, checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r"vllm has no kernel for .*it is asymmetric"):
        pipeline.export(checkpoint, tmp_path / "out", "gptq", engine="vllm")
    with pytest.raises(CheckpointError, match=r"its shape is .*; multiples of 64"):
        pipeline.export(symmetric, tmp_path / "out", "gptq", engine="vllm@0.33")
    assert not list(tmp_path.iterdir())


def test_result_that_differs_is_not_given_its_name(symmetric, tmp_path, monkeypatch):
    from qtool.exchange import _gptq_writing as writing

    monkeypatch.setattr(writing, "write_directory", _damaging(write_directory))
    with pytest.raises(CheckpointError, match="read back otherwise than"):
        pipeline.export(symmetric, tmp_path / "out", "gptq")
    assert not list(tmp_path.iterdir())


def _damaging(write):
    def damaged(departure, directory, layers, section):
        def changed():
            for name, tensors in layers:
                yield name, {n: t + 1 if n.endswith("qweight") else t for n, t in tensors.items()}

        write(departure, directory, changed(), section)

    return damaged


@pytest.mark.parametrize("target", ["gptq", "compressed-tensors"])
def test_plan_that_a_target_cannot_say_is_refused_before_it_is_solved(target, llama, tmp_path):
    for chosen, words in (
        (recipe("bcq"), "it is stored as binary_coding"),
        (recipe(embedding={"method": "rtn"}), "it is an embedding"),
    ):
        with pytest.raises(RecipeError, match=words) as caught:
            pipeline.quantize(Location(llama), tmp_path / "out", chosen, target=target)
        assert "--target dense" in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert pipeline.plan(Location(llama), wanted(), target=target).layers


def test_commands_take_what_another_program_has_quantized(symmetric, llama, text_file, tmp_path):
    pipeline.export(symmetric, tmp_path / "theirs", "gptq")
    options = pipeline.EvalOptions(
        dataset=str(text_file), context_length=64, max_windows=2, texts=False, chats=None
    )
    ours = pipeline.evaluate(Location(symmetric), options)
    theirs = pipeline.evaluate(Location(tmp_path / "theirs"), options)
    assert ours.figures[0].perplexity == theirs.figures[0].perplexity
    assert theirs.figures[0].name == "theirs"
    kept = list((cache_dir() / "imported").glob("*/theirs/config.json"))
    assert kept
    before = kept[0].stat().st_mtime_ns
    compared = pipeline.compare(
        [Location(llama), Location(tmp_path / "theirs")], pipeline.CompareOptions(texts=options)
    )
    assert kept[0].stat().st_mtime_ns == before
    assert not compared.failures()


def in_cache(model):
    return as_ours(Location(model), ignore_events).directory


def test_what_was_imported_is_of_the_files_that_there_are_now(symmetric, tmp_path):
    theirs = tmp_path / "theirs"
    pipeline.export(symmetric, theirs, "gptq")
    first = in_cache(theirs)
    for name, content in (
        ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast"}'),
        ("chat_template.jinja", "{{ messages }}"),
        ("additional_chat_templates/tool_use.jinja", "{{ tools }}"),
        ("generation_config.json", '{"eos_token_id": 9}'),
    ):
        (theirs / name).parent.mkdir(exist_ok=True)
        (theirs / name).write_text(content)
        assert (in_cache(theirs) / name).read_text() == content
    assert in_cache(theirs) != first


def test_what_is_damaged_in_the_cache_is_imported_anew(symmetric, tmp_path):
    pipeline.export(symmetric, tmp_path / "theirs", "gptq")
    file = in_cache(tmp_path / "theirs") / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert (in_cache(tmp_path / "theirs") / "model.safetensors").read_bytes() == content


def test_of_two_commands_one_imports_and_the_other_waits(symmetric, tmp_path, monkeypatch):
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "cache"))
    pipeline.export(symmetric, tmp_path / "theirs", "gptq")
    calls = []

    def slow(*arguments, **options):
        calls.append(arguments)
        time.sleep(1.5)  # longer than a run waits for a lock
        return pipeline.import_model(*arguments, **options)

    monkeypatch.setattr(imported, "import_model", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(in_cache, [tmp_path / "theirs"] * 2)
    assert first == second
    assert len(calls) == 1


def test_configuration_of_another_model_is_refused(symmetric, tmp_path):
    pipeline.export(symmetric, tmp_path / "theirs", "gptq")
    path = tmp_path / "theirs" / "config.json"
    config = json.loads(path.read_text())
    for change, words in (
        ({"num_hidden_layers": 1}, "has no such layer"),
        ({"num_hidden_layers": 3}, "needs tensors that aren't stored"),
        ({"intermediate_size": 64}, "has shape .* and config.json makes it"),
    ):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=words):
            pipeline.import_model(Location(tmp_path / "theirs"), tmp_path / "in")
    shutil.rmtree(tmp_path / "theirs")
    assert not list(tmp_path.iterdir())


def test_no_exchange_reads_an_original(llama, symmetric, tmp_path):
    fp8 = tmp_path / "fp8"
    shutil.copytree(llama, fp8)
    config = json.loads((fp8 / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (fp8 / "config.json").write_text(json.dumps(config))
    for model, words in (
        (llama, "isn't quantized: there is nothing to import"),
        (symmetric, "is a checkpoint of qtool already"),
        (fp8, "is in no format that qtool imports; these are"),
    ):
        with pytest.raises(CheckpointError, match=words):
            pipeline.import_model(Location(model), tmp_path / "in")
    assert LAYER.startswith("model.layers.0")


def test_a_model_that_says_only_in_a_file_of_its_own_how_it_was_quantized(symmetric, tmp_path):
    old = tmp_path / "old"
    pipeline.export(symmetric, old, "gptq")
    config = json.loads((old / "config.json").read_text())
    del config["quantization_config"]
    (old / "config.json").write_text(json.dumps(config))
    said = r"quantize_config\.json says how .* \"quant_method\": \"gptq\".*qtool import"
    for use in (
        lambda: pipeline.import_model(Location(old), tmp_path / "in"),
        lambda: pipeline.quantize(Location(old), tmp_path / "in", recipe()),
        lambda: load_model(Location(old)),
    ):
        with pytest.raises(CheckpointError, match=said):
            use()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_biases_that_the_model_does_not_add_are_left_out(value, symmetric, tmp_path):
    pipeline.export(symmetric, tmp_path / "theirs", "gptq")
    path = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.full((64,), value).half()
    save_file(tensors, path, {"format": "pt"})
    told: list[Any] = []
    pipeline.import_model(Location(tmp_path / "theirs"), tmp_path / "in", emit=told.append)
    assert torch.equal(logits(symmetric), logits(tmp_path / "in"))
    assert len(warnings_in(told)) == (value != 0)


@pytest.mark.parametrize(
    ("name", "is_left_out"),
    [
        ("model.layers.0.mlp.act.scales", False),  # AWQ, of families without a second linear
        ("model.layers.0.self_attn.k_proj.k_scale", False),
        ("model.layers.1.self_attn.rotary_emb.inv_freq", True),
    ],
)
def test_what_only_another_program_reads_is_not_lost_silently(
    name, is_left_out, symmetric, tmp_path
):
    pipeline.export(symmetric, tmp_path / "theirs", "gptq")
    path = tmp_path / "theirs" / "model.safetensors"
    save_file({**load_file(path), name: torch.full((96,), 2.0)}, path, {"format": "pt"})
    if is_left_out:
        pipeline.import_model(Location(tmp_path / "theirs"), tmp_path / "in")
        assert torch.equal(logits(symmetric), logits(tmp_path / "in"))
        return
    with pytest.raises(CheckpointError, match=f"{name} is stored, and the model"):
        pipeline.import_model(Location(tmp_path / "theirs"), tmp_path / "in")


def test_an_import_that_failed_goes_on(symmetric, tmp_path):
    pipeline.export(symmetric, tmp_path / "theirs", "gptq")
    model, out_dir = Location(tmp_path / "theirs"), tmp_path / "in"
    told: list[Any] = []

    def fail(event):
        told.append(event)
        if event.what == "importing" and event.done == 3:
            raise OutputError("The disk is full.")

    with pytest.raises(OutputError, match=r"3 finished layers are kept .* --resume goes on"):
        pipeline.import_model(model, out_dir, emit=fail)
    with pytest.raises(OutputError, match="holds an unfinished run"):
        pipeline.import_model(model, out_dir)
    resumed = pipeline.import_model(model, out_dir, resume=True)
    whole = pipeline.import_model(model, tmp_path / "whole")
    digests = [CheckpointReader(one.out_dir).manifest.digests for one in (resumed, whole)]
    assert digests[0] == digests[1]
    told.clear()
    again = pipeline.import_model(model, out_dir, resume=True, emit=told.append)  # nothing to do
    assert told == []
    assert again.layers == resumed.layers


def test_an_import_does_not_go_on_with_other_files(symmetric, tmp_path):
    pipeline.export(symmetric, tmp_path / "theirs", "gptq")
    model = Location(tmp_path / "theirs")

    def fail(event):
        if event.what == "importing":
            raise OutputError("The disk is full.")

    with pytest.raises(OutputError, match="1 finished layer is kept"):
        pipeline.import_model(model, tmp_path / "in", emit=fail)
    path = tmp_path / "theirs" / "config.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(OutputError, match="--overwrite"):
        pipeline.import_model(model, tmp_path / "in", resume=True)
