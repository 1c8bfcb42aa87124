"""Formats encrypted_planes and sparse_planes: nothing is lost, on any backend; what they cost."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qtool.runtime.backends
from qtool import plugins
from qtool.base import QuantizedTensor
from qtool.checkpoint.manifest import LayerEntry, codec, manifest_from_config
from qtool.checkpoint.reader import CheckpointReader
from qtool.core.sequential_code import serial_network
from qtool.core.xor_networks import tapped_network
from qtool.errors import CheckpointError, SchemeError
from qtool.formats import binary_coding, encrypted_planes, sparse_planes
from qtool.formats._encoded_starts import encrypted_start
from qtool.formats._in_planes import in_planes, opened_weight
from qtool.methods.sparse_bcq import SparseBcqOptions, quantize_sparse
from qtool.recipe.load import load_recipe
from qtool.runtime.backends._choose import load_backend, use_backend
from qtool.runtime.modules import QuantizedLinear
from qtool.scheme import BitCode, Shape2D, WeightScheme
from tests.golden.build import HERE
from tests.helpers import dequantized, encrypted, normal, problem, sparse
from tests.unit.checkpoint.test_manifest import edit_tensors

NAMES = ("encrypted_planes", "sparse_planes")
SCHEME = WeightScheme(num_bits=2, group_size=32, symmetric=True)
MAKERS = {"encrypted_planes": encrypted, "sparse_planes": sparse}


def linear_of(tensor: QuantizedTensor) -> QuantizedLinear:
    """Return a module that holds a weight as a checkpoint has it."""
    entry = LayerEntry(
        format=tensor.format, scheme=tensor.scheme, shape=tensor.shape, method="made"
    )
    module = QuantizedLinear(entry, None)
    module.load_state_dict(dict(tensor.parts))
    return module


@settings(max_examples=1000, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sparsity=st.floats(0, 1),
    num_bits=st.integers(1, 4),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40)),
)
def test_signs_of_all_that_is_kept_come_back_for_any_mask(seed, sparsity, num_bits, shape):
    generator = torch.Generator().manual_seed(seed)
    planes = torch.randint(2, (num_bits, *shape), generator=generator, dtype=torch.uint8)
    kept = torch.rand(shape, generator=generator) >= sparsity
    kept[0, 0] = True
    code = BitCode(num_inputs=2, num_outputs=5, registers=2)
    scheme = WeightScheme(num_bits=num_bits, group_size=None, symmetric=True, code=code)
    scales = 2.0 ** -torch.arange(num_bits).half()[:, None, None].expand(-1, shape[0], 1)
    network = serial_network(5, 2, 2, generator)
    tensor = sparse_planes.encode_sparse(planes, kept, scales, network, scheme)
    signs = 2 * scales * (2.0 * planes - 1)  # each pattern of signs has a sum of its own
    assert torch.equal(dequantized(tensor), torch.where(kept, signs.sum(0), 0))
    specs = codec("sparse_planes").layout(tensor.scheme, tensor.shape)
    assert {n: tuple(part.shape) for n, part in tensor.parts.items()} == {
        n: spec.shape for n, spec in specs.items()
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", plugins.names(qtool.runtime.backends))
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_model_runs_to_the_bit_what_it_would_of_planes_stored_as_they_are(name, backend, device):
    tensor = MAKERS[name](normal(40, 64), SCHEME)
    plain = opened_weight(tensor)
    assert plain.format == "binary_coding"
    moved = replace(plain, parts={part: value.to(device) for part, value in plain.parts.items()})
    reason = load_backend(backend).why_not(moved, torch.device(device))
    if reason is not None:
        pytest.skip(reason)
    with use_backend(backend):
        encoded, stored = (linear_of(each).to(device) for each in (tensor, plain))
    x = normal(3, 64).to(device)
    assert torch.equal(encoded(x), stored(x))
    assert encoded.backend is stored.backend is load_backend(backend)
    assert encoded.stored().format == name
    assert torch.equal(dequantized(in_planes(tensor)), dequantized(tensor))


def test_zeros_are_zero_and_the_rest_is_no_worse_than_by_planes_alone():
    weight = normal(30, 64)
    tensor = sparse(weight, SCHEME)
    found = dequantized(tensor)
    kept = found != 0
    assert int(kept.sum()) == 768
    assert float((found - weight)[kept].square().mean()) < 0.1


def test_encrypted_bits_are_those_asked_for_and_the_start_is_near():
    weight, generator = normal(80, 64), torch.Generator().manual_seed(0)
    errors = []
    for inputs in (4, 8, 12, 16):
        networks = tapped_network(20, inputs, 2, generator)[None]
        scheme = WeightScheme(num_bits=1, group_size=None, symmetric=True)
        tensor = encrypted_start(weight, networks, scheme)
        assert tensor.parts["encrypted_planes"].nbytes * 8 == 80 * 64 * inputs // 20
        errors.append(float((dequantized(tensor) - weight).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5
    assert errors[0] < 0.9


def test_an_identity_network_stores_the_planes_themselves():
    plain = binary_coding.encode_binary(
        torch.randint(4, (12, 2, 32), dtype=torch.uint8),
        normal(12, 2, 2).abs().sort(-1, descending=True).values.half(),
        torch.zeros(12, 2).half(),
        SCHEME,
        Shape2D(12, 64),
    )
    networks = torch.eye(4, dtype=torch.uint8).expand(2, 4, 4)
    stored = plain.parts["bit_planes"].unflatten(1, (3, 4))
    tensor = encrypted_planes.encode_encrypted(stored, networks, plain)
    assert torch.equal(opened_weight(tensor).parts["bit_planes"], plain.parts["bit_planes"])


@pytest.mark.parametrize("name", NAMES)
def test_the_code_of_an_entry_is_read_as_it_was_written_and_nothing_else(name):
    on_disk = json.loads((HERE / name / "config.json").read_text())["quantization_config"]
    manifest = manifest_from_config(on_disk, "here")
    assert json.loads(json.dumps(manifest.to_config())) == on_disk
    code = on_disk["layers"]["columns"]["scheme"]["code"]
    for wrong, match in (
        ({**code, "num_inputs": 0}, "1 and more"),
        ({**code, "num_inputs": "4"}, "whole number is meant"),
        ({**code, "num_outputs": 2**40}, "beyond"),
        ({**code, "seed": 1}, "'seed' of code is unknown"),
        ({k: v for k, v in code.items() if k != "kept"}, "'kept' of code is missing"),
        ({**code, "registers": 0, "kept": 5}, "meant"),
        ({**code, "corrections": 10**6}, "corrections"),
        (None, "an object is meant"),
    ):
        on_disk["layers"]["columns"]["scheme"]["code"] = wrong
        with pytest.raises(CheckpointError, match=match):
            manifest_from_config(on_disk, "here")


def test_other_formats_have_no_code_and_these_two_no_plain_scheme():
    code = BitCode(num_inputs=2, num_outputs=5)
    for name in plugins.names(qtool.formats):
        scheme = replace(SCHEME, code=None if name in NAMES else code)
        with pytest.raises(SchemeError, match=r"code|in_features and all"):
            codec(name).layout(scheme, Shape2D(5, 64))
    sparse_scheme = replace(SCHEME, code=replace(code, registers=1, kept=9))
    for wrong in ({"symmetric": False}, {"num_bits": 5}):
        with pytest.raises(SchemeError, match="symmetric and 4 at most"):
            codec("sparse_planes").layout(replace(sparse_scheme, **wrong), Shape2D(5, 64))
    assert "code" not in SCHEME.to_json()


def test_damaged_masks_are_refused(tmp_path):
    for path in (HERE / "sparse_planes").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def flip(tensors):
        tensors["columns.kept_weights"][0, 1] ^= 1 << 5

    edit_tensors(tmp_path, flip)
    with pytest.raises(CheckpointError, match="kept_weights has"):
        CheckpointReader(tmp_path).load("columns")


def bits_of(tensor, *names):
    """Return what parts of a weight take, in bits per weight."""
    parts = (tensor.parts[name] for name in names if name in tensor.parts)
    return sum(8 * part.nbytes for part in parts) / (
        tensor.shape.out_features * tensor.shape.in_features
    )


def test_what_is_stored_is_less_than_what_runs():
    tensor = sparse(normal(64, 320), SCHEME)
    assert bits_of(tensor, "kept_weights") == 1
    # two fifths of two planes, and what fills registers
    assert 0.8 < bits_of(tensor, "code_words", "xor_network") < 0.9
    assert opened_weight(tensor).parts["bit_planes"].nbytes * 8 == 4 * 64 * 320


def test_the_recipe_stores_signs_within_a_twentieth_of_the_entropy_bound():
    """Corrections counted; the decoder's network is the same for all layers, and isn't."""
    options = SparseBcqOptions(**load_recipe("sparse-70-encrypted").weights.options)
    given = problem(normal(192, 256), SCHEME)
    tensor = quantize_sparse(given, options).tensor
    stored = bits_of(tensor, "code_words", "correction_places", "correction_lows")
    bound = SCHEME.num_bits * (1 - options.sparsity)
    assert bound < stored < 1.05 * bound


@pytest.mark.parametrize("name", NAMES)
def test_what_runs_is_known_without_parts(name):
    tensor = MAKERS[name](normal(40, 64), SCHEME)
    bare, whole = opened_weight(replace(tensor, parts={})), opened_weight(tensor)
    assert (bare.format, bare.scheme, bare.parts) == (whole.format, whole.scheme, {})
