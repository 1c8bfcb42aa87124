"""from_pretrained: damage is refused, other classes of a family load, what is saved again loads."""

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import pipeline
from qtool.checkpoint.reader import CheckpointReader, tensor_digest
from qtool.errors import QtoolError
from qtool.modeling.locate import Location
from qtool.runtime.modules import QuantizedWeight
from tests import families
from tests.helpers import recipe

pytestmark = pytest.mark.versions

LAYER = "model.layers.0.self_attn.q_proj"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PROMPT = torch.arange(3, 23).unsqueeze(0)
TABLE = {"method": "rtn", "scheme": {"num_bits": 8, "group_size": 32}}


def load(directory: Path, kind: str = "AutoModelForCausalLM", dtype=torch.float32, **options):
    import transformers

    return getattr(transformers, kind).from_pretrained(directory, dtype=dtype, **options).eval()


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(PROMPT, use_cache=False).logits


@torch.inference_mode()
def last_hidden(model) -> torch.Tensor:
    return model(PROMPT, use_cache=False, output_hidden_states=True).hidden_states[-1]


@pytest.fixture
def damaged(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "damaged"))


@pytest.fixture(scope="module")
def tied(tiny, tmp_path_factory) -> Path:
    """Return a checkpoint with a quantized table that is the head as well."""
    out_dir = tmp_path_factory.mktemp("tied") / "out"
    pipeline.quantize(Location(tiny("llama", tied=True)), out_dir, recipe(embedding=TABLE))
    return out_dir


def with_tensors(change):
    def damage(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS, {"format": "pt"})

    return damage


def put(part: str, change):
    name = f"{LAYER}.{part}"
    return with_tensors(lambda t: t.update({name: change(t[name]).contiguous()}))


def with_config(change):
    def damage(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        change(config["quantization_config"])
        (directory / "config.json").write_text(json.dumps(config))

    return damage


def move_outside(directory: Path) -> None:
    weights = directory / WEIGHTS
    names = list(load_file(weights))
    weights.rename(directory.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (directory / INDEX).write_text(json.dumps(index))


def pickled(directory: Path) -> None:
    torch.save(load_file(directory / WEIGHTS), directory / "pytorch_model.bin")
    (directory / WEIGHTS).unlink()


DAMAGES = {
    "no codes": with_tensors(lambda t: t.pop(f"{LAYER}.codes")),
    "no scales": with_tensors(lambda t: t.pop(f"{LAYER}.scales")),
    "no zero points": with_tensors(lambda t: t.pop(f"{LAYER}.zero_points")),
    "no norm": with_tensors(lambda t: t.pop("model.norm.weight")),
    "no head": with_tensors(lambda t: t.pop("lm_head.weight")),
    "scales of float32": put("scales", torch.Tensor.float),
    "scales of bfloat16": put("scales", torch.Tensor.bfloat16),
    "scales turned": put("scales", lambda t: t.T),
    "scales that broadcast": put("scales", lambda t: t[:1, :1]),
    "scales NaN": put("scales", lambda t: t * float("nan")),
    "scales negative": put("scales", torch.neg),
    "codes of int64": put("codes", torch.Tensor.long),
    "codes of float32": put("codes", torch.Tensor.float),
    "codes without a plane": put("codes", lambda t: t[1:]),
    "no entry": with_config(lambda q: q["layers"].pop(LAYER)),
    "text for symmetric": with_config(
        lambda q: q["layers"][LAYER]["scheme"].update(symmetric="false")
    ),
    "symmetric": with_config(lambda q: q["layers"][LAYER]["scheme"].update(symmetric=True)),
    "fraction for a group": with_config(
        lambda q: q["layers"][LAYER]["scheme"].update(group_size=32.0)
    ),
    "no layers": with_config(lambda q: q.pop("layers")),
    "method's name": with_config(lambda q: q.update(manifest=5, layers=[])),
    "files outside": move_outside,
    "pickled": pickled,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint_is_refused_in_one_line(damaged, damage):
    damage(damaged)
    with pytest.raises(QtoolError) as caught:
        load(damaged)
    assert "\n" not in str(caught.value)


def test_norm_of_no_floats_is_named(damaged):
    change = {"model.norm.weight": torch.ones(64, dtype=torch.int16)}
    with_tensors(lambda t: t.update(change))(damaged)
    import transformers

    by_itself = transformers.__version__.startswith("4.")  # refuses such a parameter
    message = "floating point" if by_itself else r"model\.norm\.weight is stored as torch\.int16"
    with pytest.raises(RuntimeError if by_itself else QtoolError, match=message):
        load(damaged)


def test_norm_of_another_shape_does_not_load(damaged):
    with_tensors(lambda t: t.update({"model.norm.weight": torch.ones(65)}))(damaged)
    with pytest.raises(RuntimeError):
        load(damaged)


def test_shards_load(llama, tmp_path, monkeypatch):
    from qtool.checkpoint import writer

    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", 25_000)
    pipeline.quantize(Location(llama), tmp_path / "sharded", recipe())
    monkeypatch.undo()
    pipeline.quantize(Location(llama), tmp_path / "single", recipe())
    assert (tmp_path / "sharded" / INDEX).is_file()
    assert torch.equal(logits(load(tmp_path / "sharded")), logits(load(tmp_path / "single")))


@pytest.mark.parametrize("path", [".", "../out"])
def test_directory_may_be_named_in_any_way(tied, monkeypatch, path):
    expected = logits(load(tied))
    monkeypatch.chdir(tied)
    assert torch.equal(logits(load(path)), expected)


def test_links_as_in_the_cache_of_the_hub_are_followed(tied, tmp_path):
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for file in tied.iterdir():
        shutil.copy(file, tmp_path / "blobs" / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob-{file.name}")
    assert torch.equal(logits(load(snapshot)), logits(load(tied)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_parts_keep_their_dtypes_and_values_and_can_be_saved_again(checkpoint, tmp_path, dtype):
    model = load(checkpoint, dtype=dtype)
    stored = load_file(checkpoint / WEIGHTS)
    for name, buffer in model.named_buffers():
        if name in stored:
            assert buffer.dtype == stored[name].dtype
            assert torch.equal(buffer, stored[name])
    model.save_pretrained(tmp_path / "again")
    reader = CheckpointReader(tmp_path / "again")
    assert reader.manifest.layers == CheckpointReader(checkpoint).manifest.layers
    assert torch.equal(logits(load(tmp_path / "again", dtype=dtype)), logits(model))


def test_saved_again_there_are_no_digests(damaged, tmp_path):
    digests = {name: tensor_digest(t) for name, t in load_file(damaged / WEIGHTS).items()}
    with_config(lambda q: q.update(digests=digests))(damaged)
    assert CheckpointReader(damaged).verify() == len(digests)
    load(damaged, dtype=torch.bfloat16).save_pretrained(tmp_path / "again")
    assert CheckpointReader(tmp_path / "again").manifest.digests == {}


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": "auto"}, {}])
def test_any_way_to_place_it_gives_the_same(tied, options):
    assert torch.equal(logits(load(tied, **options)), logits(load(tied)))


def test_parts_without_memory_are_refused(tied):
    with pytest.raises(QtoolError, match=r"embed_tokens\.codes has no place in memory"):
        load(tied, device_map="meta")


def test_copies_and_pickles_of_a_tied_model_predict_the_same(tied):
    model = load(tied)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", ["AutoModel", "AutoModelForSequenceClassification"])
@pytest.mark.parametrize("which", ["tied", "checkpoint"])
def test_other_classes_have_the_same_hidden_states(which, kind, request):
    directory = request.getfixturevalue(which)
    model = load(directory, kind)
    assert any(isinstance(module, QuantizedWeight) for module in model.modules())
    assert torch.equal(last_hidden(model), last_hidden(load(directory)))


def test_other_classes_need_all_that_they_share(damaged):
    DAMAGES["no norm"](damaged)
    for kind in ("AutoModel", "AutoModelForSequenceClassification"):
        with pytest.raises(QtoolError, match=r"lacks (model\.)?norm\.weight"):
            load(damaged, kind)


def test_model_without_its_head_can_be_saved_and_gets_a_tied_one_back(tied, tmp_path):
    base = load(tied, "AutoModel")
    base.save_pretrained(tmp_path / "base")
    assert set(CheckpointReader(tmp_path / "base").manifest.layers) >= {"embed_tokens"}
    again = load(tmp_path / "base", "AutoModel")
    assert torch.equal(last_hidden(again), last_hidden(base))
    assert torch.equal(logits(load(tmp_path / "base")), logits(load(tied)))


@pytest.mark.parametrize("family", ["phi", "gptj"])
def test_tied_head_keeps_its_bias(family, tmp_path):
    """Both have a bias beside the weight that is shared."""
    families.build(family, tied=True, rotary_dim=8).save_pretrained(tmp_path / "source")
    families.save_tokenizer(tmp_path / "source")
    pipeline.quantize(Location(tmp_path / "source"), tmp_path / "out", recipe(embedding=TABLE))
    original, model = load(tmp_path / "source"), load(tmp_path / "out")
    assert torch.equal(model.lm_head.bias, original.lm_head.bias)
    assert original.lm_head.bias.abs().max() > 0
    table = model.get_input_embeddings()(torch.arange(families.VOCABULARY))
    x = torch.randn(3, table.shape[1], generator=torch.Generator().manual_seed(0))
    expected = x @ table.T + original.lm_head.bias
    torch.testing.assert_close(model.lm_head(x), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", dtype=model.dtype)), logits(model))


def test_model_without_parameters_says_what_it_is(tmp_path):
    """The norms of OLMo have no weights."""
    families.build("olmo").save_pretrained(tmp_path / "source")
    families.save_tokenizer(tmp_path / "source")
    tables: dict[str, Any] = {"embedding": TABLE, "head": TABLE}
    pipeline.quantize(Location(tmp_path / "source"), tmp_path / "out", recipe(**tables))
    model = load(tmp_path / "out", dtype=torch.bfloat16)
    assert list(model.parameters()) == []
    assert (model.dtype, model.device) == (torch.bfloat16, torch.device("cpu"))
    mask = torch.ones_like(PROMPT)
    ids = model.generate(PROMPT, attention_mask=mask, max_new_tokens=2, do_sample=False)
    assert ids.shape[1] > PROMPT.shape[1]
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", dtype=model.dtype)), logits(model))
