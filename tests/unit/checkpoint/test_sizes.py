"""Sizes by kind of tensor add up to the bytes on disk."""

import struct
from math import prod

import pytest

from qtool import pipeline
from qtool.checkpoint import writer
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.sizes import (
    AS_THEY_WERE,
    BESIDE,
    QUANTIZED,
    TABLES,
    VECTORS,
    class_sizes,
    sizes_of,
)
from qtool.modeling.load import load_original
from qtool.modeling.locate import Location
from qtool.recipe.load import recipe_from_mapping
from tests import every_family

SIZES = {"I32": 4, "F16": 2}
RTN = {"method": "rtn", "scheme": {"num_bits": 3, "group_size": 32}}
CODED = {**RTN, "method": "bcq", "options": {"scales": "coded", "rounds": 1}}
SKIPPED = {**RTN, "overrides": [{"match": "*.down_proj", "skip": True}]}
TABLE = {"method": "rtn", "scheme": {"num_bits": 4, "group_size": 16}}


def written(model, out, **sections):
    recipe = recipe_from_mapping({"weights": RTN, **sections})
    pipeline.quantize(Location(model), out, recipe)
    return sizes_of(CheckpointReader(out))


@pytest.mark.parametrize(
    ("sections", "kinds"),
    [
        ({}, {QUANTIZED, TABLES, VECTORS}),
        ({"weights": CODED}, {QUANTIZED, TABLES, VECTORS}),
        ({"weights": SKIPPED}, {QUANTIZED, AS_THEY_WERE, TABLES, VECTORS}),
        ({"embedding": TABLE}, {QUANTIZED, TABLES, VECTORS}),
    ],
)
@pytest.mark.parametrize(("shard_bytes", "tied"), [(10**12, False), (20_000, True)])
def test_sizes_add_up_to_the_bytes_on_disk(
    tiny, tmp_path, monkeypatch, sections, kinds, shard_bytes, tied
):
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", shard_bytes)
    model = tiny("llama", tied=tied)
    sizes = written(model, tmp_path / "out", **sections)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert sizes.num_bytes == sum(file.stat().st_size for file in files)
    headers = [8 + struct.unpack("<Q", file.read_bytes()[:8])[0] for file in files]
    assert sizes.header_bytes == sum(headers)
    assert len(files) > 1 or shard_bytes > 20_000
    original = load_original(model, "cpu")
    assert sizes.num_weights == sum(value.numel() for value in original.parameters())
    assert {each.kind for each in sizes.kinds} == kinds
    assert sizes.strict_bits == pytest.approx(8 * sizes.num_bytes / sizes.num_weights)


def test_sizes_of_rows_of_unlike_bits_add_up_to_the_bytes_on_disk(mixed_tables):
    reader = CheckpointReader(mixed_tables)
    sizes = sizes_of(reader)
    assert sizes.num_bytes == (mixed_tables / "model.safetensors").stat().st_size
    for name, entry in reader.manifest.layers.items():
        classes = class_sizes(entry)
        assert bool(classes) == (entry.format == "mixed_rows")
        if not classes or entry.shared_with:
            continue
        assert [(each.num_bits, each.num_rows) for each in classes] == list(entry.scheme.rows)
        assert sum(each.num_weights for each in classes) == 96 * 64
        numbers = 4 * reader.spec(f"{name}.row_classes").shape[0] * 3  # words of 96 rows
        stored = sum(each.num_bytes for each in classes) + numbers
        parts = [reader.spec(f"{name}.{part}") for part in entry.layout()]
        assert stored == entry.num_bytes() == sum(prod(p.shape) * SIZES[p.dtype] for p in parts)


def test_an_encoder_of_images_is_no_part_of_the_blocks(tmp_path):
    pytest.importorskip("transformers", minversion="5.0")
    sizes = written(every_family.save("gemma3", tmp_path / "model"), tmp_path / "out")
    by_kind = {each.kind: each for each in sizes.kinds}
    reader = CheckpointReader(tmp_path / "out")
    encoder = [n for n in reader.names() if "vision_tower" in n or "projector" in n]
    matrices = [prod(reader.spec(n).shape) for n in encoder if len(reader.spec(n).shape) > 1]
    assert by_kind[BESIDE].num_weights == sum(matrices)
    assert AS_THEY_WERE not in by_kind
