"""What isn't as it must be is refused in one line that says where; nothing else is ever raised."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.checkpoint.shards import SINGLE_NAME
from qtool.errors import CheckpointError
from qtool.exchange import load_exchange
from tests.unit.exchange.foreign import AWQ, GPTQ, LAYER, cases, ct, directory, vectors
from tests.unit.exchange.test_vectors import section_of


def read_all(path, exchange):
    read = load_exchange(exchange).read
    assert read is not None
    for load in read(path).layers.values():
        load()


def refusal(path, exchange):
    with pytest.raises(CheckpointError) as caught:
        read_all(path, exchange)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 5}, "bits is 5; 2, 3, 4, 8 are known"),
        ({"bits": "4"}, "bits is '4'; a whole number is meant"),
        ({"bits": None}, "has no bits"),
        (
            {"checkpoint_format": "gptq_p"},
            "checkpoint_format is gptq_p; known are gptq and gptq_v2",
        ),
        ({"pack_dtype": "int64"}, "pack_dtype is int64; int32 is meant"),
        ({"group_size": 32}, r"qzeros is I32 \(4, 4\); int32 \(2, 4\) is meant"),
        ({"dynamic": {"+:(": {}}}, "no regular expression"),
        ({"dynamic": {"+:.*": 4}}, "an object is meant"),
        ({"dynamic": {"+:.*up.*": {"bits": 7}}}, "bits of model.layers.0.mlp.up_proj is 7"),
        ({"dynamic": []}, "dynamic is .*; an object is meant"),
    ],
)
def test_configuration_of_gptq(change, words, tmp_path):
    parts = vectors("gptq-4-v1")
    section = {k: v for k, v in {**GPTQ, **change}.items() if v is not None}
    message = refusal(directory(tmp_path / "m", parts, section), "gptq")
    assert re.search(words, message), message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"g_idx": torch.full((64,), 9)}, "holds groups 9 to 9; 0 to 3 are meant"),
        ({"g_idx": torch.full((64,), -1)}, "holds groups -1 to -1"),
        ({"g_idx": torch.zeros(64).int()}, "gives groups other than 16 inputs each"),
        ({"g_idx": torch.zeros(20).int()}, "a number for each of 64 inputs is meant"),
        ({"qzeros": torch.zeros(4, 4)}, "is F32"),
        ({"scales": torch.full((4, 32), torch.nan)}, "holds NaN or infinity"),
        ({"scales": torch.full((4, 32), 1 / 3)}, "are no float16 numbers"),
        ({"qweight": torch.zeros(8, dtype=torch.int32)}, "no matrix"),
    ],
)
def test_tensors_of_gptq(change, words, tmp_path):
    parts = {**vectors("gptq-4-v1"), **change}
    assert words in refusal(directory(tmp_path / "m", parts, GPTQ), "gptq")


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_missing_tensor_is_named(part, tmp_path):
    parts = vectors("gptq-4-v1")
    del parts[part]
    message = refusal(directory(tmp_path / "m", parts, GPTQ), "gptq")
    assert f"tensor {LAYER}.{part} is missing" in message


def test_other_layouts_of_awq_are_refused(tmp_path):
    path = directory(tmp_path / "m", vectors("awq-4"), {**AWQ, "version": "gemv"})
    assert "version is gemv; gemm is the layout" in refusal(path, "awq")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"transform_config": {"config_groups": {"R4": {"type": "hadamard"}}}}, "rotates"),
        ({"format": "marlin-24"}, "format is marlin-24"),
        ({"config_groups": {}}, "config_groups is empty"),
        ({"config_groups": {"a": 3}}, "an object is meant"),
        ({"quantization_status": "calibration"}, "compressed is meant"),
    ],
)
def test_configuration_of_compressed_tensors(change, words, tmp_path):
    section = {**ct(4, symmetric=True), **change}
    path = directory(tmp_path / "m", vectors("ct-4-sym"), section)
    assert words in refusal(path, "compressed-tensors")


@settings(max_examples=150)
@given(case=st.sampled_from(cases()), seed=st.integers(0, 10**6))
def test_damaged_bytes_are_read_or_refused(case, seed, tmp_path_factory):
    draw = torch.Generator().manual_seed(seed)
    path = directory(tmp_path_factory.mktemp("damaged"), vectors(case), section_of(case))
    name = ("config.json", SINGLE_NAME)[seed % 2]
    content = bytearray((path / name).read_bytes())
    where = int(torch.randint(len(content) if seed % 2 == 0 else 1500, (1,), generator=draw))
    if seed % 3 == 0:
        del content[where:]
    else:
        content[where] = int(torch.randint(256, (1,), generator=draw))
    (path / name).write_bytes(content)
    exchange = {"g": "gptq", "a": "awq", "c": "compressed-tensors"}[case[0]]
    try:
        read_all(path, exchange)
    except CheckpointError as error:
        assert "\n" not in str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@settings(max_examples=150)
@given(case=st.sampled_from(cases()), value=json_values, number=st.integers(0, 20))
def test_any_value_in_a_configuration_is_read_or_refused(case, value, number, tmp_path_factory):
    section = json.loads(json.dumps(section_of(case)))
    places = [section]
    for group in section.get("config_groups", {}).values():
        places += [group, group["weights"]]
    place = places[number % len(places)]
    place[sorted(place)[number % len(place)]] = value
    exchange = {"g": "gptq", "a": "awq", "c": "compressed-tensors"}[case[0]]
    path = directory(tmp_path_factory.mktemp("odd"), vectors(case), section)
    try:
        read_all(path, exchange)
    except CheckpointError as error:
        assert "\n" not in str(error)
