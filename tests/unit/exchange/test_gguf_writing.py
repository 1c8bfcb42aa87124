"""GGUF files that are written: read by transformers and by us, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import pipeline
from qtool.checkpoint.manifest import LayerEntry, codec
from qtool.checkpoint.reader import CheckpointReader
from qtool.errors import CheckpointError, OutputError
from qtool.exchange import load_exchange
from qtool.exchange._gguf_blocks import decode_blocks
from qtool.exchange._gguf_encode import encode, type_of, type_without_zero_points
from qtool.exchange._gguf_file import open_gguf
from qtool.exchange._gguf_plan import content_of, plan_file
from qtool.exchange._gguf_tokenizer import as_metadata_say
from qtool.exchange._gguf_tokens import (
    LLAMA3_WORDS,
    QWEN2_WORDS,
    tokenizer_metadata,
    why_no_tokenizer,
)
from qtool.exchange._gguf_write import compare_gguf
from qtool.modeling.config import parse_config
from qtool.modeling.gguf_cache import convert_gguf
from qtool.modeling.locate import Location
from qtool.pipeline.export import export, open_departure
from tests import families
from tests.contract.test_exchanges import check_reads_back
from tests.helpers import recipe
from tests.unit.exchange.test_gguf import KINDS, dequantized, random_rows

gguf = pytest.importorskip("gguf")
SPECIAL = ["<pad>", "<s>", "</s>"]
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def split(words: str) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [step, {**BYTES, "use_regex": False}]}


DIGITS = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES],
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


def save_tokenizer(directory: Path, pre: dict[str, Any], *, ignore_merges: bool = False) -> None:
    """Write a tokenizer of letters and digits with two merges, that puts <s> before a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL, "Ġ", "Ċ", *"abcdefghijklmnopqrstuvwxyz0123456789", "th", "the"]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [("t", "h"), ("th", "e")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("quux", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    text = json.loads(tokenizer.to_str())
    text["pre_tokenizer"] = pre
    saved = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(text)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    saved.chat_template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    saved.save_pretrained(directory)


def quantized(folder: Path, family="llama", scheme=None, *, tied=False, **changes):
    """Return a tiny quantized model with a tokenizer that GGUF can say."""
    original = folder / "original"
    changes = {"intermediate_size": 128} | changes
    families.build(family, tied=tied, **changes).save_pretrained(original)
    save_tokenizer(original, DIGITS)
    wanted = recipe()
    updated = wanted.weights.scheme.model_copy(update={"symmetric": True, **(scheme or {})})
    weights = wanted.weights.model_copy(update={"scheme": updated})
    pipeline.quantize(
        Location(original), folder / "ours", wanted.model_copy(update={"weights": weights})
    )
    return folder / "ours"


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return quantized(tmp_path_factory.mktemp("written"))


def dense(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint, found = CheckpointReader(directory), {}
    for name in checkpoint.names():
        loaded = checkpoint.load(name)
        if isinstance(loaded, torch.Tensor):
            found[name] = loaded.float()
        else:
            values = codec(loaded.format).dequantize(loaded, torch.float32)
            found[f"{name}.weight"] = values
    return found


@pytest.mark.parametrize(
    ("family", "scheme", "changes"),
    [
        ("llama", {}, {}),
        ("mistral", {"num_bits": 8}, {"tied": True, "sliding_window": None}),
        ("qwen2", {"symmetric": False}, {}),
        (
            "qwen3",
            {"num_bits": 5},
            {"tied": True, "head_dim": 128},
        ),  # which transformers takes for it
    ],
)
def test_transformers_and_we_read_the_same_weights_and_logits(family, scheme, changes, tmp_path):
    import transformers

    directory = quantized(tmp_path, family, scheme, **changes)
    export(directory, tmp_path / "m.gguf", "gguf")
    check_reads_back("gguf", directory, tmp_path / "m.gguf")
    found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    weights, stored = dense(directory), found.state_dict()
    assert {name for name in weights if not torch.equal(weights[name], stored[name])} == set()
    config = transformers.AutoConfig.from_pretrained(directory)
    del config.quantization_config
    expected = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    expected.load_state_dict(weights, strict=False)
    expected.tie_weights()
    tokens = torch.arange(3, 43)[None]
    with torch.no_grad():
        torch.testing.assert_close(found.eval()(tokens).logits, expected.eval()(tokens).logits)


def test_biases_are_in_the_order_of_their_rows(tmp_path):
    directory = quantized(tmp_path, attention_bias=True, mlp_bias=True)  # not for transformers
    export(directory, tmp_path / "m.gguf", "gguf")
    check_reads_back("gguf", directory, tmp_path / "m.gguf")
    bias = CheckpointReader(directory).load("model.layers.0.self_attn.q_proj.bias")
    stored = open_gguf(tmp_path / "m.gguf").plain("blk.0.attn_q.bias")
    assert isinstance(bias, torch.Tensor)
    assert torch.equal(stored[:4], bias[[0, 8, 1, 9]].float())


def test_the_tokenizer_is_the_same(ours, tmp_path):
    from transformers import AutoTokenizer

    export(ours, tmp_path / "m.gguf", "gguf")
    here = AutoTokenizer.from_pretrained(ours)
    there = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = "the 12 others\nquux then</s>the"
    assert there(text).input_ids == here(text).input_ids
    assert there.chat_template == here.chat_template
    assert (there.bos_token, there.eos_token, there.pad_token) == ("<s>", "</s>", "<pad>")
    about = open_gguf(tmp_path / "m.gguf").metadata
    assert about["tokenizer.ggml.pre"] == "smollm"
    assert about["tokenizer.ggml.add_bos_token"] is True
    assert about["tokenizer.ggml.add_eos_token"] is False
    assert about["tokenizer.ggml.merges"] == ["t h", "th e"]
    kinds = about["tokenizer.ggml.token_type"]
    assert (kinds[:4], kinds[43:45], len(kinds)) == ([3, 3, 3, 1], [4, 5], families.VOCABULARY)
    assert about["tokenizer.ggml.tokens"][44] == "[PAD44]"
    assert about["general.file_type"] == 2  # Q4_0
    assert KINDS["F32"] is open_gguf(tmp_path / "m.gguf").tensors["output_norm.weight"].type


@pytest.mark.parametrize(
    ("pre", "ignore_merges", "refused"),
    [
        (BYTES, False, None),
        (split(QWEN2_WORDS), False, None),
        (split(LLAMA3_WORDS), True, None),
        (split(LLAMA3_WORDS), False, "ignore_merges"),
        (split(r"\p{L}+"), False, "gpt-2, smollm, llama-bpe, qwen2"),
        ({**BYTES, "add_prefix_space": True}, False, "cuts a text"),
        ({"type": "Whitespace"}, False, "cuts a text"),
    ],
)
def test_ways_to_cut_a_text_are_known_or_refused(pre, ignore_merges, refused, tmp_path):
    save_tokenizer(tmp_path, pre, ignore_merges=ignore_merges)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    reason = why_no_tokenizer(files, {}, 96)
    assert reason is None if refused is None else refused in str(reason)
    assert "embedding has 9 rows" in str(why_no_tokenizer(files, {}, 9)) or refused
    assert "no tokenizer.json" in str(why_no_tokenizer({}, {}, 96))
    files["tokenizer.json"] = files["tokenizer.json"][:500]
    assert "can't be read" in str(why_no_tokenizer(files, {}, 96))


def test_a_tokenizer_without_merges_is_refused_as_llama_cpp_would(tmp_path):
    save_tokenizer(tmp_path, BYTES)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    whole = json.loads(files["tokenizer.json"])
    whole["model"]["merges"] = []
    files["tokenizer.json"] = json.dumps(whole).encode()
    assert "has no merges" in str(why_no_tokenizer(files, {}, 96))


@pytest.mark.parametrize("eos", ["<pad>", "</s>"])
def test_the_first_token_of_a_vocabulary_may_begin_a_text(eos, tmp_path):
    save_tokenizer(tmp_path, BYTES)
    whole, settings = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    text = whole.read_text().replace('"id": "<s>"', '"id": "<pad>"')
    about = json.loads(text)
    about["post_processor"]["special_tokens"] = {
        "<pad>": {"id": "<pad>", "ids": [0], "tokens": ["<pad>"]}
    }
    whole.write_text(json.dumps(about))
    names = {"bos_token": "<pad>", "eos_token": eos}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **names}))
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    metadata = tokenizer_metadata(files, {}, 96)
    added = [metadata[f"tokenizer.ggml.add_{name}_token"] for name in ("bos", "eos")]
    assert added == [True, False]


@pytest.mark.parametrize(
    ("key", "of_token"), [("add_prefix_space", False), ("lstrip", True), ("single_word", True)]
)
def test_a_tokenizer_whose_spaces_a_file_cannot_say_is_refused(key, of_token, tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path, BYTES)
    plain = AutoTokenizer.from_pretrained(tmp_path)("the quux x quuxx").input_ids
    path = tmp_path / ("tokenizer.json" if of_token else "tokenizer_config.json")
    about = json.loads(path.read_text())
    (about["added_tokens"][-1] if of_token else about)[key] = True
    about |= {} if of_token else {"tokenizer_class": "GPT2Tokenizer"}
    path.write_text(json.dumps(about))
    assert AutoTokenizer.from_pretrained(tmp_path)("the quux x quuxx").input_ids != plain
    files = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    said = str(why_no_tokenizer(files, {}, 96))
    assert (f"quux ({key})" if of_token else "puts a space before a text") in said


@pytest.mark.parametrize(
    ("pre", "ignore_merges", "name"),
    [
        (DIGITS, False, "smollm"),
        (split(LLAMA3_WORDS), True, "llama-bpe"),
        (split(LLAMA3_WORDS), True, "llama-v3"),
        (split(QWEN2_WORDS), False, "deepseek-r1-qwen"),
    ],
)
def test_a_tokenizer_survives_an_import(pre, ignore_merges, name, tmp_path):
    save_tokenizer(tmp_path, pre, ignore_merges=ignore_merges)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    metadata = tokenizer_metadata(files, {}, 96)
    mended = as_metadata_say(blurred(files), {**metadata, "tokenizer.ggml.pre": name})
    assert tokenizer_metadata(mended, {}, 96) == metadata
    settings = json.loads(mended["tokenizer_config.json"])
    assert "eos_token_id" not in settings
    assert settings["add_bos_token"] is True  # which classes of transformers 4 heed
    other = as_metadata_say(blurred(files), {**metadata, "tokenizer.ggml.pre": "viking"})
    assert other["tokenizer.json"] == blurred(files)["tokenizer.json"]
    assert json.loads(other["tokenizer_config.json"])["eos_token"] == "</s>"


def blurred(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return what transformers 5.17 makes of the metadata of a tokenizer."""
    whole, settings = (
        json.loads(files[f"{one}.json"]) for one in ("tokenizer", "tokenizer_config")
    )
    whole["pre_tokenizer"], whole["model"]["ignore_merges"] = BYTES, False
    whole["model"]["byte_fallback"], whole["post_processor"] = True, None
    whole["added_tokens"] = [one for one in whole["added_tokens"] if one["content"] != "</s>"]
    wrong = {"eos_token": "<s>", "eos_token_id": 1, "pad_token": None, "add_bos_token": False}
    changed = {"tokenizer.json": whole, "tokenizer_config.json": settings | wrong}
    return files | {name: json.dumps(values).encode() for name, values in changed.items()}


def test_comparing_tells_how_far_it_is(ours, tmp_path):
    told: list[Any] = []
    export(ours, tmp_path / "m.gguf", "gguf", emit=told.append)
    compared = [one for one in told if one.what.startswith("comparing")]
    assert (compared[-1].done, compared[-1].total) == (len(compared), len(compared))


@pytest.mark.parametrize("streamed", [True, False])
def test_a_converted_file_has_the_tokenizer_that_it_says(streamed, ours, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    export(ours, tmp_path / "m.gguf", "gguf")
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "cache"))
    if not streamed:
        monkeypatch.setattr("qtool.modeling.gguf_streamed.save_streamed", lambda *_, **__: False)
    converted = convert_gguf(tmp_path / "m.gguf")
    found, meant = (json.loads((one / "tokenizer.json").read_text()) for one in (converted, ours))
    assert found["pre_tokenizer"] == meant["pre_tokenizer"] == DIGITS
    here, there = (AutoTokenizer.from_pretrained(one) for one in (ours, converted))
    assert (there.bos_token, there.eos_token, there.pad_token) == ("<s>", "</s>", "<pad>")
    text = "the 12 others\nquux then</s>the"
    assert there(text).input_ids == here(text).input_ids
    assert there.decode(there(text).input_ids) == here.decode(here(text).input_ids)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gpt2", {}, "of type gpt2"),
        ("mistral", {"sliding_window": 16}, "looks back 16 tokens"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"max_position_embeddings": 2**32}, "4294967296 positions"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "linear"),
        ("qwen2", {"rope_parameters": LLAMA3_ROPE}, "of llama only"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family, changes, said, ours):
    departure = open_departure(ours, None, lambda _event: None)
    departure.checkpoint.config.update({"model_type": family, **changes})
    parsed = parse_config(departure.checkpoint.plain_config(), ours)
    departure = replace(departure, parsed=parsed)
    reason = str(load_exchange("gguf").refuses_model(departure))
    assert reason.startswith("gguf can't say ")
    assert said in reason


def test_positions_of_llama_3_go_along(tmp_path):
    directory = quantized(tmp_path, rope_parameters=LLAMA3_ROPE, head_dim=64)
    export(directory, tmp_path / "m.gguf", "gguf")
    read = load_exchange("gguf").read
    assert read is not None
    assert read(tmp_path / "m.gguf").config["rope_parameters"] == LLAMA3_ROPE


def test_floats_stay_as_they_are_unless_a_dtype_is_asked(ours, tmp_path):
    for dtype, kind in ((None, "F16"), ("bfloat16", "BF16"), ("float32", "F32")):
        path = tmp_path / f"{dtype}.gguf"
        export(ours, path, "gguf", dtype=dtype)
        assert open_gguf(path).tensors["output.weight"].type.name == kind


def test_a_file_is_named_as_one_and_a_wrong_bit_is_found(ours, tmp_path):
    with pytest.raises(OutputError, match=r"Name m\.gguf"):
        export(ours, tmp_path / "m", "gguf")
    assert not list(tmp_path.iterdir())
    path = tmp_path / "m.gguf"
    export(ours, path, "gguf")
    departure, content = open_departure(ours, None, lambda _event: None), path.read_bytes()
    at = open_gguf(path).tensors["blk.1.attn_k.weight"].start + 5
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(CheckpointError, match=r"blk\.1\.attn_k\.weight"):
        compare_gguf(departure, path)


def test_one_tensor_is_held_at_a_time(ours, tmp_path, monkeypatch):
    import weakref

    made: list[weakref.ref[torch.Tensor]] = []

    def watched(departure, planned):
        assert all(each() is None for each in made)
        content = content_of(departure, planned)
        made.append(weakref.ref(content))
        return content

    monkeypatch.setattr("qtool.exchange._gguf_write.content_of", watched)
    export(ours, tmp_path / "m.gguf", "gguf")
    assert len(made) == len(plan_file(open_departure(ours, None, lambda _event: None)).tensors)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0"])
def test_scales_below_zero_are_written_again(name):
    raw = random_rows(name, 40, 3, 7)
    tensor = decode_blocks(raw, KINDS[name])
    assert not tensor.scheme.symmetric
    assert type_without_zero_points(tensor) == name
    again = encode(tensor, name)
    halves = raw.unflatten(1, (-1, KINDS[name].block_bytes))[..., :2].contiguous()
    there = (halves.view(torch.float16)[..., 0] != 0).repeat_interleave(
        KINDS[name].block_bytes, dim=1
    )
    assert torch.equal(again[there], raw[there])
    assert torch.equal(dequantized(decode_blocks(again, KINDS[name])), dequantized(tensor))


def test_other_zero_points_need_a_larger_type(tmp_path):
    directory = quantized(tmp_path, "llama", {"symmetric": False})
    checkpoint = CheckpointReader(directory)
    name, entry = next(iter(checkpoint.manifest.layers.items()))
    assert isinstance(entry, LayerEntry)
    loaded = checkpoint.load(name)
    assert not isinstance(loaded, torch.Tensor)
    assert (type_without_zero_points(loaded), type_of(entry)) == (None, "Q5_0")
