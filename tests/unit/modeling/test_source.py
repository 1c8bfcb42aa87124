import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import pipeline
from qtool.errors import QtoolError
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location, locate
from qtool.modeling.source import open_source
from tests import families
from tests.helpers import dequantized, recipe

WEIGHTS = "model.safetensors"
LINEAR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def copy(llama, tmp_path):
    """Return a copy of the tiny llama that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / WEIGHTS)
    changed = change(tensors)
    save_file(tensors if changed is None else changed, directory / WEIGHTS, {"format": "pt"})


def refused(directory: Path, match: str) -> None:
    with pytest.raises(QtoolError, match=match) as caught:
        open_source(locate(str(directory)))
    assert "\n" not in str(caught.value)


def test_missing_directory_is_named(tmp_path):
    refused(tmp_path / "no where", "No model directory .*no where")


def test_file_in_place_of_a_directory_is_refused(copy):
    refused(copy / WEIGHTS, "is a file; give the model's directory")


def test_missing_config_is_named(copy):
    (copy / "config.json").unlink()
    refused(copy, r"has no config\.json: it isn't a model directory")


def test_damaged_config_is_refused(copy):
    (copy / "config.json").write_text("{")
    refused(copy, r"config\.json isn't valid JSON")


def test_missing_weights_are_noticed(copy):
    (copy / WEIGHTS).unlink()
    refused(copy, "holds no safetensors file")


def test_pickled_weights_are_refused_with_the_way_out(copy):
    (copy / WEIGHTS).rename(copy / "pytorch_model.bin")
    refused(copy, r"pickled weights \(\.bin\) only.*save_pretrained")


@pytest.mark.parametrize("keep", [0.01, 0.5, 0.99])
def test_truncated_weights_are_refused(copy, keep):
    content = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(content[: int(keep * len(content))])
    refused(copy, "is truncated or no safetensors file")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff" * 8,
        (10**6).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"\x80\x04N.",
    ],
)
def test_corrupt_header_is_refused(copy, header):
    (copy / WEIGHTS).write_bytes(header)
    refused(copy, "is truncated or no safetensors file")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "BertForMaskedLM"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "T5"),
        ({"architectures": ["LlamaForCausalLM"], "is_encoder_decoder": True}, "LlamaForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
        ({"architectures": None, "model_type": "vit"}, "vit"),
        ({"architectures": [], "model_type": None}, "of unknown type"),
    ],
)
def test_model_that_is_not_causal_is_refused(copy, changes, what):
    edit_config(copy, **changes)
    refused(copy, rf"is no causal language model \(.*{what}.*\)")


@pytest.mark.parametrize("method", ["gptq", "qtool"])
def test_quantized_model_is_not_quantized_again(copy, method):
    edit_config(copy, quantization_config={"quant_method": method})
    refused(copy, rf"already quantized \({method}\)\. Start from the original")


def test_quantized_model_that_names_no_method_is_said_to(copy):
    edit_config(copy, quantization_config={"bits": 4, "quant_method": None})
    refused(copy, r"already quantized \(it doesn't say how\)")
    edit_config(copy, quantization_config="")
    refused(copy, r"quantization_config is ''; it must be an object")


def test_checkpoint_of_qtool_is_not_quantized_again(checkpoint):
    refused(checkpoint, r"already quantized \(qtool\)")


def test_missing_block_is_noticed(copy):
    def drop(tensors):
        return {n: t for n, t in tensors.items() if not n.startswith("model.layers.0.")}

    edit_tensors(copy, drop)
    refused(copy, r"names 2 blocks, and no tensor of block 0 is stored")


def test_missing_last_block_is_noticed(copy):
    def drop(tensors):
        return {n: t for n, t in tensors.items() if not n.startswith("model.layers.1.")}

    edit_tensors(copy, drop)
    refused(copy, r"names 2 blocks, and no tensor of block 1 is stored")


def test_missing_linear_is_named(copy):
    edit_tensors(copy, lambda tensors: tensors.pop(LINEAR) is None or tensors)
    refused(copy, f"the model needs tensors that aren't stored: {LINEAR}\\.")


@pytest.mark.parametrize("table", ["model.embed_tokens.weight", "lm_head.weight"])
def test_missing_table_is_named(copy, table):
    edit_tensors(copy, lambda tensors: {n: t for n, t in tensors.items() if n != table})
    refused(copy, f"the model needs tensors that aren't stored: {table}\\.")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_weight_of_another_dtype_is_refused(copy, dtype):
    edit_tensors(copy, lambda tensors: {**tensors, LINEAR: tensors[LINEAR].to(dtype)})
    refused(copy, f"{LINEAR} is .*; qtool reads F16, BF16, F32")


@pytest.mark.parametrize("dtype", [torch.int16, torch.bool, torch.uint8])
def test_norm_of_no_floats_is_refused_by_whoever_opens_or_loads_it(copy, dtype):
    norm = "model.layers.1.input_layernorm.weight"
    edit_tensors(copy, lambda tensors: {**tensors, norm: tensors[norm].to(dtype)})
    refused(copy, f"{norm} is .*; qtool reads F16, BF16, F32")
    with pytest.raises(QtoolError, match=f"{norm} is .*; qtool reads F16, BF16, F32"):
        load_model(Location(copy))


def test_linear_that_is_no_matrix_is_refused(copy):
    edit_tensors(copy, lambda tensors: {**tensors, LINEAR: tensors[LINEAR].flatten()})
    refused(copy, r"is \(6144,\), and config\.json makes it \(96, 64\)")


def test_weights_of_another_family_are_refused(copy):
    edit_config(copy, model_type="opt", architectures=["OPTForCausalLM"])
    refused(copy, r"needs tensors that aren.t stored: model\.decoder\.")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_float_dtypes_are_quantized_alike(copy, llama, tmp_path, dtype):
    edit_tensors(copy, lambda tensors: {n: t.to(dtype) for n, t in tensors.items()})
    result = pipeline.quantize(Location(copy), tmp_path / "out", recipe())
    plain = pipeline.quantize(Location(llama), tmp_path / "plain", recipe())
    for layer, other in zip(result.layers, plain.layers, strict=True):
        assert layer.metrics["nmse"] == pytest.approx(other.metrics["nmse"], rel=0.05)


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("llama", "model.")])
def test_checkpoint_saved_from_the_base_model_is_read_under_full_names(tmp_path, family, prefix):
    model = families.build(family, tied=True)
    model.base_model.save_pretrained(tmp_path / "base")
    edit_config(tmp_path / "base", architectures=[type(model).__name__])
    families.save_tokenizer(tmp_path / "base")
    stored = load_file(tmp_path / "base" / WEIGHTS)
    assert not any(name.startswith(prefix) for name in stored)
    source = open_source(Location(tmp_path / "base"))
    assert all(name.startswith(prefix) for name in source.names())
    assert source.head_is_tied
    pipeline.quantize(Location(tmp_path / "base"), tmp_path / "out", recipe(num_bits=8))
    loaded = load_model(Location(tmp_path / "out")).model
    tokens = torch.arange(3, 20).unsqueeze(0)
    with torch.inference_mode():
        expected, got = (m(tokens).logits.float() for m in (model.float(), loaded))
    assert float((got - expected).norm() / expected.norm()) < 0.05


def test_sharded_input_is_read_like_a_single_file(llama, tmp_path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    single, sharded = open_source(Location(llama)), open_source(Location(tmp_path / "sharded"))
    assert list(single.names()) == list(sharded.names())
    for name in single.names():
        assert torch.equal(single.read(name), sharded.read(name))
    pipeline.quantize(Location(tmp_path / "sharded"), tmp_path / "out", recipe())
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_conv1d_weights_are_read_as_out_by_in(tiny):
    source = open_source(Location(tiny("gpt2")))
    layer = "transformer.h.0.attn.c_attn"
    assert source.spec(f"{layer}.weight").shape == (64, 192)
    assert source.weight_shape(layer) == (192, 64)
    assert torch.equal(source.read_weight(layer), source.read(f"{layer}.weight").float().T)


def test_layers_come_in_the_order_of_execution(llama):
    names = list(open_source(Location(llama)).block_linears())
    assert [name.rsplit(".", 1)[-1] for name in names[:7]] == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]
    assert len(names) == 14


def test_tied_head_that_is_stored_as_well_is_not_copied(tiny, tmp_path):
    directory = Path(shutil.copytree(tiny("llama", tied=True), tmp_path / "copy"))

    def store_head(tensors):
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    edit_tensors(directory, store_head)
    plan = pipeline.plan(Location(directory), recipe(embedding={}))
    assert plan.tied_head == "lm_head"
    assert "lm_head.weight" not in plan.kept


def test_companions_leave_out_what_belongs_to_the_weights(copy):
    (copy / "model.safetensors.index.json").write_text("{}")
    (copy / "notes.bin").write_text("x")
    (copy / "folder.json").mkdir()
    names = set(open_source_companions(copy))
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert not names & {"config.json", "model.safetensors.index.json", "notes.bin", "folder.json"}


def open_source_companions(directory: Path) -> dict[str, bytes]:
    (directory / "model.safetensors.index.json").unlink()  # else it would be read
    return open_source(Location(directory)).companions()


def test_what_is_not_quantized_is_copied_bit_for_bit(llama, checkpoint):
    from qtool.checkpoint.reader import CheckpointReader

    source, reader = open_source(Location(llama)), CheckpointReader(checkpoint)
    quantized = {f"{name}.weight" for name in reader.manifest.layers}
    kept = [name for name in source.names() if name not in quantized]
    assert len(kept) == 2 * 2 + 3  # two norms a block, last norm, embedding, head
    for name in kept:
        stored = reader.load(name)
        assert isinstance(stored, torch.Tensor)
        assert torch.equal(stored, source.read(name))


def test_stored_error_is_the_error_of_the_written_weight(llama, tmp_path):
    from qtool.checkpoint.reader import CheckpointReader

    result = pipeline.quantize(Location(llama), tmp_path / "out", recipe())
    source, reader = open_source(Location(llama)), CheckpointReader(tmp_path / "out")
    for layer in result.layers:
        tensor = reader.load(layer.name)
        assert not isinstance(tensor, torch.Tensor)
        weight = source.read_weight(layer.name)
        error = (dequantized(tensor) - weight).square().sum() / weight.square().sum()
        assert layer.metrics["nmse"] == pytest.approx(float(error), rel=1e-4)
