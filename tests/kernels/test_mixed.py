"""Rows of unlike bits through the kernels' own text, launched on the CPU."""

import pytest
import torch

from qtool.runtime.backends.cuda import mixed, planes
from qtool.runtime.backends.cuda.launch import Card
from qtool.runtime.backends.cuda.mixed import MixedWeight
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import dequantized, normal
from tests.kernels.host import Recorder

SMALL = Card(multiprocessors=2, shared_bytes=144 * 1024)
WIDE = Card(multiprocessors=5, shared_bytes=227 * 1024)
# Classes of (bits, rows): one row, a whole tile, more than a tile.
CLASSES = [
    ((3, 40),),
    ((4, 1), (2, 39)),
    ((8, 16), (4, 1), (3, 20)),
    ((5, 3), (4, 17), (3, 1), (2, 16), (1, 9)),
]


def weight(rows, inputs=320, group_size=64, dtype=torch.float16, *, symmetric=False):
    """Return a random weight and what the kernels make of it."""
    scheme = WeightScheme(
        num_bits=rows[0][0], group_size=group_size, symmetric=symmetric, rows=rows
    )
    shape = Shape2D(sum(count for _, count in rows), inputs)
    tensor = random_tensor("mixed_rows", scheme, shape, 1)
    prepared = mixed.prepare_weight(tensor, dtype)
    assert isinstance(prepared, MixedWeight)
    assert (prepared.scheme, prepared.shape) == (scheme, shape)
    return tensor, prepared


def check(tensor, prepared, x, *, card=SMALL, **how):
    """Multiply, and compare with float64 within the rounding of weights and result."""
    launch = Recorder()
    got = mixed.multiply_mixed(x, prepared, launch, card, **how)
    exact = dequantized(tensor, torch.float64)
    assert (got.shape, got.dtype) == ((len(x), len(exact)), x.dtype)
    terms = x.double().abs() @ exact.abs().T
    error = (got.double() - x.double() @ exact.T).abs()
    assert bool((error <= 2 * torch.finfo(x.dtype).eps * terms + 1e-30).all())
    return launch


@pytest.mark.parametrize("rows", CLASSES, ids=str)
@pytest.mark.parametrize("batch", [1, 3, 25])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_class_writes_the_outputs_of_its_rows(rows, batch, dtype):
    tensor, prepared = weight(rows, dtype=dtype)
    launch = check(tensor, prepared, normal(batch, 320).to(dtype), card=WIDE)
    layouts = [planes.Layout(p, 64, 1) for p in (rows[0][0], 1)]
    first, last = (planes.product_for(batch, layout, WIDE).name for layout in layouts)
    together = "bit_plane_classes"
    names = {1: [first], 5: [together, last]}.get(len(rows), [together])
    assert launch.names == (["dequantize"] * len(rows) if batch == 25 else names)


@pytest.mark.parametrize("group_size", [32, 64, 128, 320, None])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_grouping_is_multiplied(group_size, symmetric):
    tensor, prepared = weight(CLASSES[2], group_size=group_size, symmetric=symmetric)
    for batch in (1, 9):
        check(tensor, prepared, normal(batch, 320).half())


def test_inputs_in_slabs_are_added_up_at_the_places_of_the_rows():
    tensor, prepared = weight(CLASSES[1], 9216, 256)
    launch = check(tensor, prepared, normal(8, 9216).half())
    assert launch.names == ["bit_plane_lookup_mma", "add_splits"] * 2


@pytest.mark.parametrize("kernel", ["planes", "lut", "dequantize", "sign_flip"])
def test_every_kernel_can_be_asked_for(kernel, monkeypatch):
    monkeypatch.setenv("QTOOL_KERNEL", kernel)
    tensor, prepared = weight(CLASSES[2])
    check(tensor, prepared, normal(2, 320).half(), kernel=kernel)


def test_groups_that_the_tiles_cannot_hold_go_by_the_definition():
    tensor, prepared = weight(CLASSES[2], 96, 16)
    assert not prepared.is_tiled
    launch = check(tensor, prepared, normal(3, 96).half())
    assert launch.names == ["sign_flip"] * 3
    index = torch.tensor([[36, 0], [5, 5]])
    found = mixed.gather_mixed(index, prepared, Recorder())
    assert torch.equal(found, dequantized(tensor).half()[index])


def test_shifted_inputs_and_no_inputs():
    tensor, prepared = weight(CLASSES[2])
    check(tensor, prepared, normal(321).half()[1:].view(1, 320))
    assert check(tensor, prepared, normal(0, 320).half()).names == []


@pytest.mark.parametrize("rows", CLASSES, ids=str)
def test_rows_are_those_of_the_rounded_weight_and_others_are_no_numbers(rows):
    tensor, prepared = weight(rows)
    out_features = tensor.shape.out_features
    index = torch.tensor([*range(out_features), 0, out_features, -1]).view(1, -1)
    launch = Recorder()
    found = mixed.gather_mixed(index, prepared, launch)
    assert launch.names == ["gather_rows"] * len(rows)
    assert found.shape == (1, out_features + 3, 320)
    expected = dequantized(tensor).half()
    assert torch.equal(found[0, :-2], expected[index[0, :-2]])
    assert bool(found[0, -2:].isnan().all())
    assert mixed.gather_mixed(index[:, :0], prepared, Recorder()).shape == (1, 0, 320)


def test_what_is_prepared_is_the_weight_and_where_its_rows_are():
    tensor, prepared = weight(CLASSES[3])
    assert torch.equal(prepared.dense(), dequantized(tensor).half())
    for part, places in zip(prepared.classes, prepared.places, strict=True):
        assert torch.equal(part.dense(), prepared.dense()[places])
        assert part.stored is None, "tables would need the parts as well"
