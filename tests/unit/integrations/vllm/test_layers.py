"""vLLM's layers hold what a checkpoint has, on each of several ranks; on vLLM where it is."""

import importlib
import importlib.util
import json
import sys
import tomllib
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qtool import pipeline
from qtool.errors import BackendError, CheckpointError
from qtool.modeling.locate import Location
from tests import vllm_stand_in as stand_in
from tests.helpers import ROOT, normal, recipe
from tests.vllm_stand_in import LAYERS, RANKED, load

HAVE_VLLM = importlib.util.find_spec("vllm") is not None
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
QKV = [f"{ATTENTION}.{each}_proj" for each in "qkv"]
GATE_UP = [f"{MLP}.{each}_proj" for each in ("gate", "up")]
HEADS, KV_HEADS, HEAD, WIDTH, INNER, WORDS = 4, 2, 16, 64, 96, 96
TABLE = {"method": "rtn", "scheme": {"num_bits": 8, "group_size": 32}}
RANKS = [1, 2, 4]
UNLIKE = {
    "method": "rtn",
    "scheme": {"num_bits": 4, "group_size": 8},
    "overrides": [
        {"match": "*.k_proj", "scheme": {"num_bits": 6}},
        {"match": "*.up_proj", "skip": True},
    ],
}


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    """Return vLLM's layers, or what stands in for them, of a rank that tests may set."""
    rank = SimpleNamespace(number=0, count=1)
    known = set(sys.modules)
    if not HAVE_VLLM:
        for name, module in stand_in.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
    for name in RANKED:
        module = importlib.import_module(name)
        for function, field in (("rank", "number"), ("world_size", "count")):
            monkeypatch.setattr(
                module,
                f"get_tensor_model_parallel_{function}",
                lambda field=field: getattr(rank, field),
                raising=False,
            )
    linear, tables = (importlib.import_module(name) for name in RANKED[:2])
    yield SimpleNamespace(rank=rank, **{**vars(tables), **vars(linear)})
    if not HAVE_VLLM:  # they were made of what stands in
        for name in set(sys.modules) - known:
            if name.startswith("qtool.integrations.vllm."):
                monkeypatch.delitem(sys.modules, name)


class Model:
    """A checkpoint in the hands of vLLM, one layer at a time."""

    def __init__(self, directory, vllm):
        self.vllm, self.directory = vllm, directory
        self.tensors = load_file(directory / "model.safetensors")
        loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.dense = loaded.eval().requires_grad_(False)

    def config(self):
        from qtool.integrations.vllm.config import QtoolVllmConfig

        stored = json.loads((self.directory / "config.json").read_text())
        config = QtoolVllmConfig.from_config(stored["quantization_config"])
        config.packed_modules_mapping = PACKED
        return config

    def expected(self, names, x):
        return torch.cat([self.dense.get_submodule(name)(x) for name in names], -1)

    def qkv(self):
        layer = self.vllm.QKVParallelLinear(
            WIDTH,
            HEAD,
            HEADS,
            KV_HEADS,
            bias=False,
            quant_config=self.config(),
            prefix=f"{ATTENTION}.qkv_proj",
        )
        load(layer, self.tensors, QKV, "qkv")
        return layer

    def gate_up(self):
        layer = self.vllm.MergedColumnParallelLinear(
            WIDTH,
            [INNER, INNER],
            bias=False,
            quant_config=self.config(),
            prefix=f"{MLP}.gate_up_proj",
        )
        load(layer, self.tensors, GATE_UP, (0, 1))
        return layer

    def down(self):
        layer = self.vllm.RowParallelLinear(
            INNER,
            WIDTH,
            bias=False,
            quant_config=self.config(),
            prefix=f"{MLP}.down_proj",
            reduce_results=False,
        )
        load(layer, self.tensors, [f"{MLP}.down_proj"], [None])
        return layer


def quantized(tiny, out_dir, *, tied=False, **sections):
    pipeline.quantize(Location(tiny("llama", tied=tied)), out_dir, recipe(**sections))
    return out_dir


@pytest.fixture(params=["rtn", "bcq", "unlike"], scope="module")
def checkpoint(request, tiny, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("vllm") / "out"
    if request.param == "unlike":
        return quantized(tiny, out_dir, weights=UNLIKE)
    return quantized(tiny, out_dir, method=request.param, group_size=8)


@pytest.fixture
def model(checkpoint, vllm):
    return Model(checkpoint, vllm)


def pieces(y, sizes):
    return y.split(list(sizes), -1)


@pytest.mark.parametrize("count", RANKS)
def test_queries_keys_and_values_of_all_ranks_are_those_of_the_model(model, vllm, count):
    x, vllm.rank.count = normal(5, WIDTH), count
    q, k, v = pieces(model.expected(QKV, x), [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD])
    shared = max(1, count // KV_HEADS)  # ranks that hold the same heads of keys and values
    for vllm.rank.number in range(count):
        of_kv = vllm.rank.number // shared
        parts = [q.chunk(count, -1)[vllm.rank.number]]
        parts += [each.chunk(count // shared, -1)[of_kv] for each in (k, v)]
        torch.testing.assert_close(model.qkv()(x)[0], torch.cat(parts, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", RANKS)
def test_gate_and_up_of_all_ranks_are_those_of_the_model(model, vllm, count):
    x, vllm.rank.count = normal(5, WIDTH), count
    both = pieces(model.expected(GATE_UP, x), [INNER, INNER])
    for vllm.rank.number in range(count):
        expected = torch.cat([each.chunk(count, -1)[vllm.rank.number] for each in both], -1)
        torch.testing.assert_close(model.gate_up()(x)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", RANKS)
def test_what_ranks_make_of_their_inputs_adds_up(model, vllm, count):
    x, vllm.rank.count = normal(5, INNER), count
    total = torch.zeros(5, WIDTH)
    for vllm.rank.number, part in enumerate(x.chunk(count, -1)):
        total += model.down()(part.contiguous())[0]
    torch.testing.assert_close(total, model.expected([f"{MLP}.down_proj"], x), rtol=0, atol=1e-5)


def test_a_group_that_would_be_cut_is_refused(tiny, vllm, tmp_path):
    model = Model(quantized(tiny, tmp_path / "out", group_size=32), vllm)
    vllm.rank.count = vllm.rank.number = 2
    vllm.rank.number = 1
    with pytest.raises(BackendError, match=r"down_proj, 64 x 96, can't be spread over 2 ranks"):
        model.down()  # 48 inputs


def test_layers_that_agree_are_one_product(tiny, vllm, tmp_path):
    same = Model(quantized(tiny, tmp_path / "same"), vllm)
    assert [len(layer.qtool_products) for layer in (same.qkv(), same.gate_up())] == [1, 1]
    unlike = Model(quantized(tiny, tmp_path / "unlike", weights=UNLIKE), vllm)
    assert [len(layer.qtool_products) for layer in (unlike.qkv(), unlike.gate_up())] == [3, 2]


def test_layers_that_are_not_quantized_are_vllms_own(tiny, vllm, tmp_path):
    model = Model(quantized(tiny, tmp_path / "out", weights=UNLIKE), vllm)
    method = model.config().get_quant_method
    own = vllm.UnquantizedLinearMethod
    linear = vllm.LinearBase.__new__(vllm.LinearBase)
    assert isinstance(method(linear, "model.layers.0.mlp.router"), own)
    assert not isinstance(method(linear, f"{MLP}.gate_up_proj"), own)
    assert method(torch.nn.Module(), f"{ATTENTION}.attn") is None


def table(vllm, model, kind, prefix):
    return getattr(vllm, kind)(WORDS, WIDTH, quant_config=model.config(), prefix=prefix)


@pytest.mark.parametrize("prefix", ["model.embed_tokens", ""])
@pytest.mark.parametrize("count", [1, 2])
def test_ranks_have_their_words_and_pad(tiny, vllm, tmp_path, count, prefix):
    model = Model(quantized(tiny, tmp_path / "out", embedding=TABLE, head=TABLE), vllm)
    x, ids, logits = normal(5, WIDTH), torch.arange(WORDS), []
    vllm.rank.count = count
    for vllm.rank.number in range(count):
        rows = table(vllm, model, "VocabParallelEmbedding", prefix)
        load(rows, model.tensors, ["model.embed_tokens"], [None])
        own = rows.shard_indices
        here = ids[own.org_vocab_start_index : own.org_vocab_end_index]
        found = rows.quant_method.embedding(rows, here - own.org_vocab_start_index)
        assert torch.equal(found, model.dense.model.embed_tokens(here))
        head = table(vllm, model, "ParallelLMHead", "lm_head")
        load(head, model.tensors, ["lm_head"], [None])
        logits.append(head.quant_method.apply(head, x))
    found = torch.cat(logits, -1)
    assert found.shape == (5, 128)
    torch.testing.assert_close(found[:, :WORDS], model.dense.lm_head(x), rtol=0, atol=1e-5)
    assert not found[:, WORDS:].any()


def test_a_tied_head_reads_the_table(tiny, vllm, tmp_path):
    model = Model(quantized(tiny, tmp_path / "out", tied=True, embedding=TABLE), vllm)
    rows = table(vllm, model, "VocabParallelEmbedding", "")
    head = table(vllm, model, "ParallelLMHead", "lm_head").tie_weights(rows)
    assert [name for name, _ in head.named_parameters()] == []
    load(rows, model.tensors, ["model.embed_tokens"], [None])
    load(head, model.tensors, [], [])
    x = normal(3, WIDTH)
    found = head.quant_method.apply(head, x, torch.ones(128))
    expected = model.dense.lm_head(x) + 1
    torch.testing.assert_close(found[:, :WORDS], expected, rtol=0, atol=1e-5)
    plain = SimpleNamespace(quant_method=None)
    with pytest.raises(BackendError, match="which vLLM's model can't have"):
        head.quant_method.tie_weights(head, plain)


def test_rows_of_unlike_bits_are_spread_too(mixed_tables, vllm):
    model = Model(mixed_tables, vllm)
    vllm.rank.count, found = 2, []
    for vllm.rank.number in range(2):
        rows = table(vllm, model, "VocabParallelEmbedding", "model.embed_tokens")
        load(rows, model.tensors, ["model.embed_tokens"], [None])
        words = rows.shard_indices.org_vocab_end_index - rows.shard_indices.org_vocab_start_index
        found.append(rows.quant_method.embedding(rows, torch.arange(words)))
    expected = model.dense.model.embed_tokens(torch.arange(WORDS))
    assert torch.equal(torch.cat(found), expected)


def test_quantized_inputs_are_those_of_the_model(tiny, vllm, tmp_path):
    sections = {"activations": {"num_bits": 8, "granularity": "token"}}
    model = Model(quantized(tiny, tmp_path / "out", **sections), vllm)
    x = 3 * normal(5, WIDTH)
    torch.testing.assert_close(model.qkv()(x)[0], model.expected(QKV, x), rtol=0, atol=1e-5)


def test_what_is_missing_or_comes_twice_is_refused(tiny, vllm, tmp_path):
    model = Model(quantized(tiny, tmp_path / "out"), vllm)
    stored = dict(model.tensors)
    gone = next(name for name in stored if name.startswith(f"{MLP}.down_proj."))
    del model.tensors[gone]
    with pytest.raises(CheckpointError, match=f"lacks {gone}"):
        model.down()
    model.tensors = stored
    with pytest.raises(BackendError, match="loaded once"):
        load(model.down(), {}, [], [])


def test_renamed_modules_keep_their_schemes(tiny, vllm, tmp_path):
    model = Model(quantized(tiny, tmp_path / "out", tied=True, embedding=TABLE), vllm)
    config, before = model.config(), model.config().layers

    class Mapper:
        def apply_dict(self, values):
            return {f"language_model.{name}": value for name, value in values.items()}

    config.apply_vllm_mapper(Mapper())
    assert set(config.layers) == {f"language_model.{name}" for name in before}
    assert (
        config.layers["language_model.lm_head"].shared_with == "language_model.model.embed_tokens"
    )
    assert config.layers[f"language_model.{QKV[0]}"] == before[QKV[0]]


def test_experts_are_refused(tiny, vllm, tmp_path):
    from qtool.integrations.vllm.config import QtoolVllmConfig

    model = Model(quantized(tiny, tmp_path / "out"), vllm)

    class FusedMoE(torch.nn.Module):
        pass

    config = QtoolVllmConfig({"model.layers.0.experts.0.up_proj": model.config().layers[QKV[0]]})
    with pytest.raises(BackendError, match="quantized experts"):
        config.get_quant_method(FusedMoE(), "model.layers.0.experts")
    assert config.get_quant_method(FusedMoE(), "model.layers.1.experts") is None


@pytest.mark.skipif(HAVE_VLLM, reason="vLLM's own table of methods is looked at elsewhere")
def test_the_entry_point_registers_the_configuration():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (target,) = project["entry-points"]["vllm.general_plugins"].values()
    module, _, name = target.partition(":")
    for _ in range(2):
        getattr(importlib.import_module(module), name)()
    found = stand_in.REGISTERED["qtool"]
    assert found.__name__ == "QtoolVllmConfig"
    assert LAYERS in sys.modules[f"{LAYERS}.quantization"].__name__
    assert found.get_config_filenames() == []
