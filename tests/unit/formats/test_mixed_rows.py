"""Rows of unlike bits: order, bytes, and what is refused."""

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.base import PartSpec
from qtool.checkpoint.manifest import LayerEntry, codec, num_bytes
from qtool.checkpoint.reader import CheckpointReader, check_values
from qtool.core.packing import codes_to_planes
from qtool.errors import CheckpointError, SchemeError
from qtool.formats.mixed_rows import CODEC, encode_mixed, row_bits_of, split_rows
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import dequantized
from tests.unit.checkpoint.test_manifest import edit, edit_tensors

row_bits = st.lists(st.integers(1, 8), min_size=1, max_size=40)


def classes_of(bits, in_features=20, group_size=8, *, symmetric=False):
    """Return a class of random weights for each width."""
    classes = []
    for num_bits in sorted(set(bits), reverse=True):
        scheme = WeightScheme(num_bits=num_bits, group_size=group_size, symmetric=symmetric)
        shape = Shape2D(bits.count(num_bits), in_features)
        classes.append(random_tensor("coded_scales", scheme, shape, num_bits))
    return classes


def joined(bits, **changes):
    return encode_mixed(classes_of(bits, **changes), torch.tensor(bits, dtype=torch.uint8))


@given(bits=row_bits, symmetric=st.booleans(), group_size=st.sampled_from([8, 64, None]))
def test_every_row_is_what_its_class_has(bits, symmetric, group_size):
    classes = classes_of(bits, group_size=group_size, symmetric=symmetric)
    tensor = encode_mixed(classes, torch.tensor(bits, dtype=torch.uint8))
    weight = dequantized(tensor, torch.float64)
    for each in classes:
        rows = [row for row, num_bits in enumerate(bits) if num_bits == each.scheme.num_bits]
        assert torch.equal(weight[rows], dequantized(each, torch.float64))


@given(bits=row_bits)
def test_classes_and_the_order_of_rows_come_back(bits):
    classes, tensor = classes_of(bits), joined(bits)
    again, places = split_rows(tensor)
    assert row_bits_of(tensor).tolist() == bits
    stacked = [each.scheme.num_bits for each in again for _ in range(each.shape.out_features)]
    assert [stacked[place] for place in places] == bits
    assert sorted(places.tolist()) == list(range(len(bits)))
    for one, other in zip(classes, again, strict=True):
        assert (one.format, one.scheme, one.shape) == (other.format, other.scheme, other.shape)
        assert all(torch.equal(one.parts[name], part) for name, part in other.parts.items())
        assert one.parts.keys() == other.parts.keys()


@given(bits=row_bits, in_features=st.integers(1, 70))
def test_bytes_are_those_of_the_classes_and_of_the_numbers_of_the_rows(bits, in_features):
    tensor = joined(bits, in_features=in_features)
    stored = sum(part.numel() * part.element_size() for part in tensor.parts.values())
    layout = CODEC.layout(tensor.scheme, tensor.shape)
    assert stored == sum(map(num_bytes, layout.values()))
    own = [
        num_bytes(spec)
        for each in classes_of(bits, in_features=in_features)
        for spec in codec("coded_scales").layout(each.scheme, each.shape).values()
    ]
    width = (len(set(bits)) - 1).bit_length()
    assert stored == sum(own) + 4 * width * -(-len(bits) // 32)


@settings(max_examples=30)
@given(first=row_bits, second=row_bits)
def test_rows_below_one_another_keep_their_bits(first, second):
    tensors = [joined(first), joined(second)]
    both = CODEC.cat(tensors, 0)
    assert row_bits_of(both).tolist() == first + second
    expected = torch.cat([dequantized(each, torch.float64) for each in tensors])
    assert torch.equal(dequantized(both, torch.float64), expected)


def test_classes_without_rows_are_left_out():
    bits, classes = [3, 2, 3], classes_of([3, 2, 3])
    empty = random_tensor("coded_scales", WeightScheme(num_bits=5, group_size=8), Shape2D(1, 20), 0)
    cut = replace(empty, shape=Shape2D(0, 20))
    tensor = encode_mixed([cut, *classes], torch.tensor(bits, dtype=torch.uint8))
    assert tensor.scheme.rows == ((3, 2), (2, 1))
    assert tensor.scheme.num_bits == 3


@pytest.mark.parametrize(
    ("classes", "bits"),
    [
        (classes_of([4, 2, 2]), [4, 4, 2]),
        (classes_of([4, 2])[::-1], [4, 2]),
        (classes_of([4, 2]), [4, 3]),
        ([*classes_of([4]), *classes_of([2], group_size=4)], [4, 2]),
        ([*classes_of([4]), *classes_of([2], in_features=24)], [4, 2]),
        ([*classes_of([4]), *classes_of([2], symmetric=True)], [4, 2]),
        ([replace(each, format="binary_coding") for each in classes_of([4, 2])], [4, 2]),
    ],
)
def test_classes_that_are_not_those_of_the_rows_are_refused(classes, bits):
    with pytest.raises(SchemeError, match=r"don't make a weight .* the widest first"):
        encode_mixed(classes, torch.tensor(bits, dtype=torch.uint8))


@pytest.mark.parametrize(
    "rows",
    [
        ((4, 2), (4, 1)),
        ((2, 1), (4, 2)),
        ((4, 0),),
        ((9, 1), (4, 1)),
        ((4, 1), (0, 1)),
        ((4, True),),
        ((4, 1, 1),),
        ((3, 3),),
        (4,),
        ("41",),
    ],
)
def test_impossible_classes_are_refused(rows):
    with pytest.raises(SchemeError, match="meant"):
        WeightScheme(num_bits=4, rows=rows)


def test_other_formats_have_no_classes_of_rows():
    scheme, shape = WeightScheme(num_bits=4, rows=((4, 1), (2, 2))), Shape2D(3, 8)
    for name in ("affine", "binary_coding", "coded_scales"):
        with pytest.raises(SchemeError, match="Format mixed_rows"):
            codec(name).layout(scheme, shape)
    with pytest.raises(SchemeError, match="all 4 rows"):
        CODEC.layout(scheme, Shape2D(4, 8))
    with pytest.raises(SchemeError, match="in_features"):
        WeightScheme(num_bits=4, group_dim="out_features", rows=((4, 3),))
    assert "rows" not in WeightScheme(num_bits=4).to_json()
    assert WeightScheme(num_bits=4, rows=[[4, 1], [2, 2]]) == scheme  # type: ignore[arg-type]
    assert hash(scheme) == hash(replace(scheme))


def test_an_entry_with_classes_is_read_as_it_was_written(mixed_tables):
    reader = CheckpointReader(mixed_tables)
    manifest = reader.manifest
    config = json.loads(json.dumps(manifest.to_config()))
    on_disk = json.loads((mixed_tables / "config.json").read_text())["quantization_config"]
    assert config["layers"] == on_disk["layers"]
    entry = manifest.layers["model.embed_tokens"]
    assert isinstance(entry, LayerEntry)
    assert sum(count for _, count in entry.scheme.rows) == 96
    tensor = reader.load("model.embed_tokens")
    assert row_bits_of(tensor).unique().tolist() == [1, 2, 3, 4, 5, 8]  # type: ignore[arg-type]


@pytest.fixture
def copied(mixed_tables, tmp_path):
    directory = tmp_path / "copy"
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        (directory / name).write_bytes((mixed_tables / name).read_bytes())
    return directory


def test_damaged_numbers_of_classes_are_refused(copied):
    def flip(tensors):
        tensors["model.embed_tokens.row_classes"][0, 1] ^= 1 << 5

    edit_tensors(copied, flip)
    with pytest.raises(
        CheckpointError, match=r"row_classes has \[.*\] of its numbers, from 0 on; \["
    ):
        CheckpointReader(copied).load("model.embed_tokens")


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([], r"rows is \[\]"),
        ([[8, 96]], "is missing|is no part of|its scheme needs"),
        ([[8, 95]], "the classes have 95 rows"),
        ([[8.0, 96]], "pairs of bits"),
        ({}, "a list is meant|rows is"),
        (None, "rows is"),
    ],
)
def test_damaged_classes_in_the_manifest_are_refused(copied, rows, match):
    edit(copied, lambda q: q["layers"]["model.embed_tokens"]["scheme"].update(rows=rows))
    edit(copied, lambda q: q["layers"].pop("lm_head"))
    with pytest.raises(CheckpointError, match=match):
        CheckpointReader(copied)


def test_classes_in_a_scheme_of_another_format_are_refused(copied):
    name = "model.layers.0.self_attn.q_proj"
    edit(copied, lambda q: q["layers"][name]["scheme"].update(rows=[[4, 64]]))
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}: .*Format mixed_rows"):
        CheckpointReader(copied)


def test_parts_of_a_class_that_belong_to_nobody_are_found(copied):
    def add(tensors):
        tensors["model.layers.0.self_attn.q_proj.bit_planes_w7"] = torch.zeros(1).int()

    edit_tensors(copied, add)
    with pytest.raises(CheckpointError, match="bit_planes_w7 is no part of a layer"):
        CheckpointReader(copied)


def test_counts_of_packed_numbers_are_checked():
    numbers = torch.tensor([[0, 1, 1, 0, 2]], dtype=torch.uint8)
    packed, spec = codes_to_planes(numbers, 2).squeeze(1), PartSpec("int32", (2, 1))
    check_values("x", replace(spec, counts=(2, 2, 1)), packed)
    for counts in ((3, 2), (2, 1, 2), (1, 2, 1, 1)):
        with pytest.raises(CheckpointError, match="x has"):
            check_values("x", replace(spec, counts=counts), packed)
