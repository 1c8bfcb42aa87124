"""Old checkpoints stay readable, and today's writer gives the same bytes."""

import hashlib
import json

import pytest
import torch

import qtool.formats
from qtool import plugins
from qtool.base import QuantizedTensor
from qtool.checkpoint.reader import CheckpointReader
from qtool.core.packing import codes_to_planes, pack_bits
from tests.golden.build import (
    ACTIVATIONS,
    GOLDEN,
    HASHES,
    HERE,
    QUANTIZED_INPUTS,
    SCHEMES,
    WEIGHTS,
    hashes,
    write,
)
from tests.helpers import dequantized

FORMATS = plugins.names(qtool.formats)
EXPECTED = json.loads(HASHES.read_text(encoding="utf-8"))
REGENERATE = "python -m tests.golden.build writes the files anew; is the format version new too?"


def test_every_format_has_a_golden_checkpoint():
    assert set(EXPECTED) == set(GOLDEN)
    assert set(WEIGHTS) == set(FORMATS)


@pytest.mark.parametrize("name", GOLDEN)
def test_committed_files_are_those_that_were_hashed(name):
    assert hashes(HERE / name) == EXPECTED[name], REGENERATE


@pytest.mark.parametrize("name", GOLDEN)
def test_writer_gives_the_committed_bytes(name, tmp_path):
    write(name, tmp_path / name)
    for path in sorted((HERE / name).iterdir()):
        assert (tmp_path / name / path.name).read_bytes() == path.read_bytes(), REGENERATE


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("layer", SCHEMES)
def test_committed_weights_dequantize_to_the_hashed_numbers(name, layer):
    tensor = CheckpointReader(HERE / name).load(layer)
    assert isinstance(tensor, QuantizedTensor)
    weight = dequantized(tensor, torch.float64).contiguous().numpy()
    digest = hashlib.sha256(weight.astype("<f8").tobytes()).hexdigest()
    assert digest == EXPECTED[name][f"weight {layer}"]


def test_how_inputs_are_quantized_is_read_back_and_is_version_2():
    manifest = CheckpointReader(HERE / QUANTIZED_INPUTS).manifest
    assert manifest.format_version == 2
    assert {n: e.activation for n, e in manifest.layers.items() if e.activation} == ACTIVATIONS
    assert all(CheckpointReader(HERE / name).manifest.format_version == 1 for name in FORMATS)


def test_bytes_of_packed_words():
    bits = torch.zeros(40, dtype=torch.uint8)
    bits[[0, 3, 31, 32, 39]] = 1
    words = pack_bits(bits)
    assert words.numpy().tobytes().hex() == "0900008081000000"


def test_bytes_of_bit_planes():
    # 5 = 101, 3 = 011, 0 = 000, 7 = 111: planes of weight 4, 2 and 1, lowest index in bit 0.
    planes = codes_to_planes(torch.tensor([[5, 3, 0, 7]], dtype=torch.uint8), 3)
    assert planes.numpy().tobytes().hex() == "090000000a0000000b000000"
