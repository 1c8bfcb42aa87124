"""Recipes flexor and pnr: what their schedules say, and what learns by them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qtool.checkpoint.manifest import codec
from qtool.core.compressions import decayed, in_planes_of, movement, pruned
from qtool.core.xor_networks import tapped_network
from qtool.formats._encoded_starts import encrypted_start
from qtool.formats.binary_coding import encode_binary
from qtool.scheme import Shape2D, WeightScheme
from qtool.steps.options import read_options
from qtool.training.recipes.flexor import FlexorOptions, network_size, sharpness_at
from qtool.training.recipes.pnr import CompressedLayers, FreeLinear, PnrOptions
from qtool.training.student import LearnedLinear
from tests.helpers import dequantized, encrypted, normal

SCHEMES = [
    WeightScheme(num_bits=2, group_size=16),
    WeightScheme(num_bits=1, group_size=None, symmetric=True),
    WeightScheme(num_bits=2, group_size=8, group_dim="out_features", symmetric=True),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_encrypted_weight_that_learns_is_what_it_will_be_stored_as(scheme):
    tensor = encrypted(normal(21, 40), scheme)
    layer = LearnedLinear(tensor, None, moves_codes=True)
    assert torch.allclose(layer.weight(), dequantized(tensor), atol=1e-6)
    assert layer.shifts is not None
    with torch.no_grad():  # some stored bits turn, and scales move
        layer.shifts[..., ::3] *= -1
        for move in layer.moves.values():
            move += 0.1
    stored = layer.stored()
    assert stored.format == "encrypted_planes"
    assert not torch.equal(stored.parts["encrypted_planes"], tensor.parts["encrypted_planes"])
    assert torch.allclose(layer.weight(), dequantized(stored), atol=2e-3)
    again = codec(stored.format).layout(stored.scheme, stored.shape)
    assert {name: tuple(part.shape) for name, part in stored.parts.items()} == {
        name: spec.shape for name, spec in again.items()
    }


def test_stored_bits_learn_to_come_nearer_than_by_scales_alone():
    weight, generator = normal(40, 32), torch.Generator().manual_seed(0)
    scheme = WeightScheme(num_bits=1, group_size=None, symmetric=True)
    network = tapped_network(10, 8, 2, generator)[None]
    wrong = encrypted_start(-weight, network, scheme)

    def learned(*, bits: bool) -> float:
        layer = LearnedLinear(wrong, None, moves_codes=bits)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
        for _ in range(100):
            optimizer.zero_grad()
            (layer.weight() - weight).square().mean().backward()
            optimizer.step()
        return float((dequantized(layer.stored()) - weight).square().mean())

    assert learned(bits=True) < 0.7 * learned(bits=False)


def test_sharpness_rises_along_a_line_and_stays():
    options = FlexorOptions(first_sharpness=5, sharpness=10, sharpening=0.2)
    found = [sharpness_at(options, step, 100) for step in (0, 10, 20, 99)]
    assert found == pytest.approx([5, 7.5, 10, 10])
    assert sharpness_at(FlexorOptions(sharpening=0), 0, 100) == FlexorOptions().sharpness


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_compression_makes_is_what_is_stored(scheme):
    weight = normal(24, 40)
    codes, theta, made = in_planes_of(weight, scheme)
    shape = Shape2D(24, 40)
    stored = encode_binary(codes, theta[..., :-1], theta[..., -1], scheme, shape)
    assert torch.allclose(dequantized(stored), made, atol=1e-6)
    assert float((made - weight).square().mean()) < 0.6
    again = in_planes_of(made, scheme)[2]
    assert torch.allclose(again, made, atol=2e-3), "compressing twice is compressing once"


def test_pruned_and_decayed_weights():
    weight = normal(10, 10)
    sparse = pruned(weight, 0.7)
    assert int((sparse == 0).sum()) == 70
    assert torch.equal(sparse[sparse != 0], weight[sparse != 0])
    assert torch.equal(pruned(sparse, 0.7), sparse)
    twice = decayed(decayed(weight, 0.1, 5), 0.1, 5)
    assert torch.allclose(decayed(weight, 0.1, 10), twice)


@given(
    sparsity=st.floats(0, 0.99),
    weight=arrays(np.float32, (3, 5), elements=st.sampled_from([-2.0, -1.0, 0.5, 1.0, 2.0])),
)
def test_of_equal_weights_pruning_leaves_its_share(sparsity, weight):
    w = torch.from_numpy(weight)
    left = pruned(w, sparsity)
    assert int((left == 0).sum()) == round(sparsity * 15)
    lost, kept = w[left == 0].abs(), w[left != 0].abs()
    assert not len(lost) or not len(kept) or lost.max() <= kept.min()
    unmoved = pruned(w, sparsity, torch.zeros_like(w))  # none has a gradient
    assert int((unmoved == 0).sum()) == round(sparsity * 15)


@pytest.mark.parametrize("compression", ["quantize", "prune", "decay"])
@pytest.mark.parametrize("kind", ["normal", "equal", "zero"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_looks_see_what_will_be_stored(scheme, kind, compression):
    normally = normal(24, 40)
    weight = {"normal": normally, "equal": 0.5 * normally.sign(), "zero": 0 * normally}[kind]
    options = PnrOptions(compression=compression, sparsity=0.6, memory=5)
    layers = CompressedLayers(options, {"one": FreeLinear(weight, None)}, {"one": scheme})
    stored = dequantized(layers.stored("one"))
    assert torch.allclose(layers.seen("one"), stored, atol=1e-6)
    if compression == "prune" and kind != "zero":
        assert int((stored == 0).sum()) == 576  # 60 %, of equal ones too


@given(
    weight=arrays(np.float32, (3, 5), elements=st.floats(-2, 2, width=32)),
    target=arrays(np.float32, (3, 5), elements=st.floats(-2, 2, width=32)),
)
def test_movement_is_what_brings_weights_away_from_zero(weight, target):
    """Of a loss whose gradient points from a target to the weight, so a step goes to the target."""
    w, t = torch.from_numpy(weight).double(), torch.from_numpy(target).double()
    moved = movement(w, w - t)
    farther = (w + 1e-6 * (t - w)).abs() - w.abs()
    sure = (farther.abs() > 1e-9) & (w.abs() > 1e-3)  # it doesn't step across zero
    assert torch.equal((moved > 0)[sure], (farther > 0)[sure])
    assert not moved[w == 0].any()


def test_pruning_by_movement_keeps_what_grows_not_what_is_large():
    layer = FreeLinear(torch.tensor([[1.0, -0.9, 0.2, -0.1]]), None, watched=True)
    assert torch.equal(layer.pruned(0.5) != 0, torch.tensor([[True, True, False, False]]))
    layer.move.grad = torch.tensor([[1.0, -1.0, -1.0, 1.0]])  # shrinks the large, grows the small
    layer.watch()
    assert torch.equal(layer.pruned(0.5) != 0, torch.tensor([[False, False, True, True]]))


def test_networks_of_layers_are_told_apart_by_name():
    own = {"planes": 1, "overrides": [{"match": "*.down_proj", "inputs": 4, "outputs": 6}]}
    options = read_options("flexor", FlexorOptions, own, "--set")
    found = [network_size(name, options) for name in ("a.up_proj", "a.down_proj")]
    assert [(one.planes, one.inputs, one.outputs) for one in found] == [(1, 8, 10), (1, 4, 6)]


def test_a_free_layer_is_a_linear_that_can_become_another():
    weight, bias, x = normal(6, 8), normal(1, 6)[0], normal(3, 8)
    layer = FreeLinear(weight, bias)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, weight, bias))
    layer.become(2 * weight)
    assert torch.allclose(layer.weight(), 2 * weight, atol=1e-6)
