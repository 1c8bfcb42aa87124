"""Switching adapters: what is prepared takes over scales in place, and planes stay."""

from dataclasses import replace

import pytest
import torch

from qtool.checkpoint.adapter import PLANE_SCALES, rescaled
from qtool.checkpoint.manifest import LayerEntry
from qtool.formats._in_planes import in_planes
from qtool.runtime.backends._choose import load_backend
from qtool.runtime.backends.cuda.fusing import fuse
from qtool.runtime.backends.cuda.linear_kernels import prepare
from qtool.runtime.held import Held
from qtool.runtime.modules import QuantizedLinear
from qtool.scheme import WeightScheme
from tests.helpers import normal
from tests.unit.training.solved import solved

SCHEME = WeightScheme(num_bits=3, group_size=32)
CPU = torch.device("cpu")


def changes(tensor, seed, planes=1):
    shape = in_planes(tensor).parts[PLANE_SCALES].shape[1:]
    return {PLANE_SCALES: normal(planes, *shape, seed=seed).abs().half()}


def test_a_weight_takes_over_scales_and_keeps_its_planes():
    weight = solved("binary_coding", normal(40, 96), SCHEME)
    held = prepare(weight, torch.float16, keep_stored=False)
    assert held.tiles is not None
    planes, content = held.tiles.planes, held.tiles.planes.clone()
    for seed in (1, 2):
        new = rescaled(weight, changes(weight, seed))
        assert held.rescale(new)
        assert held.tiles.planes is planes
        assert torch.equal(planes, content)
        expected = prepare(new, torch.float16, keep_stored=False)
        assert torch.equal(held.dense(), expected.dense())
    assert held.rescale(weight)
    assert torch.equal(held.dense(), prepare(weight, torch.float16, keep_stored=False).dense())


def test_an_affine_weight_has_centers_and_is_prepared_anew():
    weight = solved("affine", normal(40, 96), SCHEME)
    held = prepare(weight, torch.float16, keep_stored=False)
    new = rescaled(weight, changes(weight, 1))
    assert not held.rescale(new)
    binary = prepare(new, torch.float16, keep_stored=False)
    assert not binary.rescale(weight)
    assert binary.rescale(rescaled(weight, changes(weight, 2)))


@pytest.mark.parametrize("rows", [(32, 16, 16), (48, 48, 20)])
def test_parts_of_a_fused_weight_write_where_the_whole_reads(rows):
    weights = [solved("binary_coding", normal(n, 96, seed=n), SCHEME) for n in rows]
    fused = fuse(weights, torch.float16)
    assert fused is not None
    new = [rescaled(weight, changes(weight, seed)) for seed, weight in enumerate(weights)]
    for part, tensor in zip(fused.parts, new, strict=True):
        assert part.rescale(tensor)
    expected = fuse(new, torch.float16)
    assert expected is not None
    assert torch.equal(fused.prepared.dense(), expected.prepared.dense())


@pytest.mark.parametrize("rows", [8, 24, 48])
def test_halves_of_gate_and_up_write_where_both_are_read(rows):
    weights = [solved("binary_coding", normal(rows, 96, seed=n), SCHEME) for n in (0, 1)]
    fused = fuse(weights, torch.float16, interleave=True)
    assert fused is not None
    new = [rescaled(weight, changes(weight, seed)) for seed, weight in enumerate(weights)]
    for part, tensor in zip(fused.parts, new, strict=True):
        assert part.rescale(tensor)
    expected = fuse(new, torch.float16, interleave=True)
    assert expected is not None
    assert torch.equal(fused.prepared.dense(), expected.prepared.dense())
    assert torch.equal(fused.parts[1].dense(), expected.parts[1].dense())


@pytest.fixture
def linear():
    """Return a module that holds what the kernels read, though on a CPU, and its weight."""
    weight = solved("binary_coding", normal(40, 96), SCHEME)
    entry = LayerEntry(format=weight.format, scheme=SCHEME, shape=weight.shape, method="bcq")
    made = QuantizedLinear(entry, None)
    for name, part in weight.parts.items():
        made.get_buffer(name).copy_(part)
    prepared = prepare(weight, torch.float16, keep_stored=False)
    made._held = Held(load_backend("cuda"), prepared, torch.float16, CPU)
    return made, weight


def test_a_module_switches_without_preparing_anew(linear):
    made, weight = linear
    held, contents = made._held, made.contents
    adapter = changes(weight, 1)
    made.adapt(adapter)
    assert made._held is held
    assert made.contents is contents  # a decoder that reads it has the new scales too
    new = prepare(rescaled(weight, adapter), torch.float16, keep_stored=False)
    assert torch.equal(held.prepared.dense(), new.dense())
    assert torch.equal(made.tensor().parts[PLANE_SCALES][:1], adapter[PLANE_SCALES])
    assert all(torch.equal(made.stored().parts[name], part) for name, part in weight.parts.items())
    made.adapt({})
    assert made._held is held
    plain = prepare(weight, torch.float16, keep_stored=False)
    assert torch.equal(held.prepared.dense(), plain.dense())


def test_a_decoder_with_a_copy_is_made_anew(linear):
    made, weight = linear
    contents, made.is_copied = made.contents, True
    made.adapt(changes(weight, 1))
    assert made.contents is not contents


def test_low_rank_keeps_the_layout_but_not_the_decoder(linear):
    made, _ = linear
    held, contents = made._held, made.contents
    made.adapt({"down": normal(2, 96).half(), "up": normal(40, 2).half()})
    assert made._held is held
    assert made.contents is not contents


def test_quantized_inputs_are_prepared_anew(linear):
    made, weight = linear
    made._held = replace(made._held, integers=object())
    made.adapt(changes(weight, 1))
    assert made._held is None
