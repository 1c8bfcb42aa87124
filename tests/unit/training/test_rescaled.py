"""Scales that learn over packed planes: the gradient is that of the dense weight, in float64."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.checkpoint.adapter import PLANE_OFFSETS, PLANE_SCALES, rescaled, with_adapter
from qtool.checkpoint.manifest import codec
from qtool.core import grouping
from qtool.errors import SchemeError
from qtool.formats._in_planes import in_planes
from qtool.scheme import GROUP_DIMS, WeightScheme
from qtool.steps.method_choice import load_method
from qtool.training.adapters.alpha import AlphaOptions, RescaledLinear
from tests.helpers import dequantized, normal, problem
from tests.unit.training.solved import SOLVERS, solved


def linear(tensor, bias=None):
    entry = SimpleNamespace(activation=None, shape=tensor.shape)
    return SimpleNamespace(stored=lambda: tensor, bias=bias, entry=entry)


def dense_of(layer, moves, shifts):
    """Return the weight in float64, from the definition of the format; rounding has no gradient."""

    def rounded(exact, stored):
        torch.testing.assert_close(stored.double(), exact, rtol=1e-3, atol=1e-6)
        return stored.detach().double() + exact - exact.detach()

    scales = layer.scales.double()
    scales = torch.cat([scales[: len(moves)] * (1 + moves), scales[len(moves) :]])
    scales = rounded(scales, layer.scales_now())
    offsets = layer.offsets.double()
    if shifts is not None:
        steps = 2 * layer.scales.double().sum(0) / (2 ** len(scales) - 1)
        offsets = rounded(offsets + shifts * steps, layer.offsets_now())
    codes, weight = layer.codes(), offsets.unsqueeze(-1)
    for plane, scale in enumerate(scales):
        signs = 2.0 * ((codes >> (len(scales) - 1 - plane)) & 1).double() - 1
        weight = weight + signs * scale.unsqueeze(-1)
    joined = grouping.join(weight, layer.scheme.grouped_length(layer.shape))
    return grouping.to_rows(joined, layer.scheme)


def close(found, expected):
    size = float(expected.detach().abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * size + 1e-9)


@given(
    st.sampled_from(sorted(SOLVERS)),
    st.integers(1, 4),
    st.sampled_from(GROUP_DIMS),
    st.sampled_from([None, 8, 24]),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
)
def test_the_gradient_is_that_of_the_dense_weight(name, bits, dim, size, planes, offsets, per_row):
    if name == "coded_scales" and (dim == "out_features" or size is None):
        return
    scheme = WeightScheme(num_bits=bits, group_size=size, group_dim=dim)
    weight = solved(name, normal(12, 40), scheme)
    options = AlphaOptions(planes=planes, offsets=offsets, per_row=per_row)
    layer = RescaledLinear(linear(weight, normal(12, seed=3)), options)
    with torch.no_grad():
        layer.moves.add_(0.1 * normal(*layer.moves.shape, seed=1))
    x = normal(2, 5, 40, seed=2).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    moves, inputs = (each.detach().double().requires_grad_() for each in (layer.moves, x))
    shifts = None if layer.shifts is None else layer.shifts.detach().double().requires_grad_()
    expected = inputs @ dense_of(layer, moves, shifts).T + layer.bias.double()
    expected.square().sum().backward()
    close(y, expected)
    close(layer.moves.grad, moves.grad)
    close(x.grad, inputs.grad)
    if shifts is not None and layer.shifts is not None:
        close(layer.shifts.grad, shifts.grad)


@pytest.mark.parametrize("name", sorted(SOLVERS))
@pytest.mark.parametrize("planes", [1, 3])
def test_merging_is_exact_and_shares_the_planes(name, planes):
    weight = solved(name, normal(16, 64), WeightScheme(num_bits=3, group_size=16))
    layer = RescaledLinear(linear(weight), AlphaOptions(planes=planes, offsets=True))
    with torch.no_grad():
        layer.moves.add_(0.05 * normal(*layer.moves.shape, seed=1))
    adapter = layer.adapter()
    assert adapter.keys() == {PLANE_SCALES, PLANE_OFFSETS}
    assert len(adapter[PLANE_SCALES]) == planes
    new = with_adapter(weight, adapter)
    binary = in_planes(weight)
    assert new.parts["bit_planes"] is not binary.parts["bit_planes"] or name == "binary_coding"
    assert torch.equal(new.parts["bit_planes"], binary.parts["bit_planes"])
    assert torch.equal(new.parts[PLANE_SCALES][planes:], binary.parts[PLANE_SCALES][planes:])
    dense = layer.dense(layer.scales_now(), layer.offsets_now(), layer.codes())
    torch.testing.assert_close(dequantized(new), dense.detach(), rtol=1e-6, atol=1e-7)


def test_no_dense_weight_is_kept():
    weight = solved("binary_coding", normal(64, 256), WeightScheme(num_bits=2, group_size=64))
    layer = RescaledLinear(linear(weight), AlphaOptions())
    kept: list[torch.Tensor] = []

    def note(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(normal(3, 256).requires_grad_()).sum()
    assert kept
    assert max(tensor.numel() for tensor in kept) < 64 * 256 / 4


def test_a_format_without_planes_is_refused_in_a_sentence():
    method = load_method("dint")
    options = method.options()
    tensor = method.solve(
        problem(normal(8, 32), WeightScheme(num_bits=4, group_size=16)), options
    ).tensor
    with pytest.raises(
        SchemeError, match=r"no scales that an adapter could replace\. Use low-rank"
    ):
        rescaled(tensor, {PLANE_SCALES: torch.ones(1, 8, 2).half()})
    assert rescaled(tensor, {}) is tensor
    assert codec(tensor.format).trainable is None


def test_low_rank_merges_to_the_nearest_level():
    weight = solved("binary_coding", normal(16, 64), WeightScheme(num_bits=3, group_size=16))
    up, down = 0.3 * normal(16, 2, seed=1).half(), normal(2, 64, seed=2).half()
    wanted = dequantized(weight) + up.float() @ down.float()
    new = with_adapter(weight, {"up": up, "down": down})
    assert torch.equal(new.parts[PLANE_SCALES], weight.parts[PLANE_SCALES])
    missed = (dequantized(new) - wanted).abs()
    for codes in range(8):  # no level of a group is nearer
        planes = torch.tensor([[1.0 if codes >> (2 - i) & 1 else -1.0] for i in range(3)])
        level = (weight.parts[PLANE_SCALES].float() * planes[:, :, None]).sum(0)
        level = level + weight.parts[PLANE_OFFSETS].float()
        assert bool((missed <= (level.repeat_interleave(16, 1) - wanted).abs() + 1e-4).all())
