"""Format coded_scales: what it means, what it costs, and that it stays a binary-coded weight."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import pipeline
from qtool.base import QuantizedTensor
from qtool.checkpoint.reader import CheckpointReader
from qtool.core import coded_scales
from qtool.formats import binary_coding
from qtool.formats import coded_scales as coded_format
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.recipe.load import recipe_from_mapping
from qtool.runtime.backends._choose import load_backend
from qtool.runtime.backends.cuda import fusing
from qtool.scheme import GROUP_DIMS, Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor, schemes, shapes
from tests.helpers import dequantized, normal

LARGEST = torch.finfo(torch.float16).max


def random_theta(rows: int, groups: int, num_bits: int, seed: int) -> torch.Tensor:
    scales = normal(rows, groups, num_bits, seed=seed).abs().sort(-1, descending=True).values
    return torch.cat([scales, normal(rows, groups, 1, seed=seed + 1)], -1)


@settings(max_examples=40)
@given(scheme=schemes, shape=shapes, seed=st.integers(0, 10_000))
def test_it_is_a_binary_coded_weight_to_the_bit(scheme, shape, seed):
    tensor = random_tensor("coded_scales", scheme, shape, seed)
    binary = coded_format.to_binary(tensor)
    for part, spec in binary_coding.CODEC.layout(scheme, shape).items():
        found = binary.parts[part]
        assert (str(found.dtype), tuple(found.shape)) == (f"torch.{spec.dtype}", spec.shape)
    assert torch.equal(dequantized(binary, torch.float64), dequantized(tensor, torch.float64))


@pytest.mark.parametrize("backend", ["dense", "reference"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_backends_give_the_bits_of_the_binary_coded_weight(backend, symmetric):
    scheme = WeightScheme(num_bits=3, group_size=32, symmetric=symmetric)
    tensor = random_tensor("coded_scales", scheme, Shape2D(24, 96), 0)
    loaded, x = load_backend(backend), normal(5, 96)
    first, second = (
        loaded.matmul(x, loaded.prepare(each, torch.float32))
        for each in (tensor, coded_format.to_binary(tensor))
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("interleave", [False, True])
def test_kernels_get_the_tiles_of_the_binary_coded_weight(interleave):
    scheme = WeightScheme(num_bits=3, group_size=32)
    tensors = [random_tensor("coded_scales", scheme, Shape2D(32, 96), i) for i in range(2)]
    plain = [coded_format.to_binary(tensor) for tensor in tensors]
    coded, expected = (
        fusing.fuse(each, torch.float16, interleave=interleave) for each in (tensors, plain)
    )
    assert coded is not None
    assert expected is not None
    for part in ("planes", "scales"):
        tiles = [getattr(fused.prepared.tiles, part) for fused in (coded, expected)]
        assert torch.equal(*tiles)


def test_a_model_is_written_as_planned_and_read_back(llama, tmp_path):
    sections = {"method": "bcq", "scheme": {"num_bits": 3, "group_size": 32}}
    options = {"scales": "coded", "rounds": 2}
    recipe = recipe_from_mapping({"weights": {**sections, "options": options}})
    plan = pipeline.plan(Location(llama), recipe)
    pipeline.quantize(Location(llama), tmp_path / "out", recipe)
    reader = CheckpointReader(tmp_path / "out")
    assert {entry.format for entry in reader.manifest.layers.values()} == {"coded_scales"}
    for layer in plan.layers:
        assert reader.manifest.layers[layer.name].num_bytes() == layer.num_bytes
    model = load_model(Location(tmp_path / "out"), device="cpu", dtype=torch.float32).model
    name = plan.layers[0].name
    stored, x = reader.load(name), normal(3, plan.layers[0].shape.in_features)
    assert isinstance(stored, QuantizedTensor)
    got, expected = model.get_submodule(name)(x), x @ dequantized(stored).T
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@given(num_bits=st.integers(1, 8), symmetric=st.booleans(), seed=st.integers(0, 10_000))
def test_what_is_stored_is_read_back(num_bits, symmetric, seed):
    scheme, shape = WeightScheme(num_bits=num_bits, group_size=8, symmetric=symmetric), (5, 20)
    theta = random_theta(5, 3, num_bits, seed)
    row_scales = coded_scales.fit_row_scales(theta)
    theta = coded_scales.rounded(theta, row_scales)
    codes = torch.zeros(5, 3, 8, dtype=torch.uint8)
    tensor = coded_format.encode_coded(codes, theta, row_scales, scheme, Shape2D(*shape))
    parts = coded_format.to_binary(tensor).parts
    assert torch.equal(parts["plane_scales"].permute(1, 2, 0).float(), theta[..., :-1])
    if not symmetric:
        assert torch.equal(parts["plane_offsets"].float(), theta[..., -1])


@given(num_bits=st.integers(1, 8), seed=st.integers(0, 10_000))
def test_rounding_is_off_by_half_a_unit_at_most(num_bits, seed):
    theta = random_theta(6, 4, num_bits, seed)
    row_scales = coded_scales.fit_row_scales(theta)
    units = row_scales.float() * 2.0 ** -coded_scales.resolution(num_bits)
    error = (coded_scales.rounded(theta, row_scales) - theta).abs().amax((1, 2))
    # The row scale is rounded too, and so is each result: a part in 2^11 of the largest.
    assert bool((error <= units / 2 + row_scales.float() * 2.0**-9).all())


@pytest.mark.parametrize("num_bits", range(1, 9))
def test_any_bits_mean_finite_weights(num_bits):
    scheme = WeightScheme(num_bits=num_bits, group_size=8)
    tensor = random_tensor("coded_scales", scheme, Shape2D(6, 20), 1)
    for bits in (0, -1):
        parts = {
            **tensor.parts,
            "scale_codes": torch.full_like(tensor.parts["scale_codes"], bits),
            "row_scales": torch.full((6,), LARGEST, dtype=torch.float16),
        }
        hostile = QuantizedTensor("coded_scales", scheme, tensor.shape, parts)
        assert bool(torch.isfinite(dequantized(hostile, torch.float64)).all())


@pytest.mark.parametrize("peak", [0.0, 1e-7, 1e-4, 6e4])
def test_rows_of_every_size_keep_their_scales(peak):
    theta = peak * torch.tensor([[[1.0, 0.5, 0.25, -0.5], [0.5, 0.25, 0.125, 0.25]]])
    row_scales = coded_scales.fit_row_scales(theta)
    rounded = coded_scales.rounded(theta, row_scales)
    assert bool(torch.isfinite(rounded).all())
    assert bool((rounded[..., :-1] >= 0).all())
    assert bool(((rounded - theta).abs() <= peak / 16 + 2.0**-24).all())


@pytest.mark.parametrize("group_dim", GROUP_DIMS)
def test_what_lengthens_rows_of_groups_is_joined_as_binary_coding(group_dim):
    scheme = WeightScheme(num_bits=2, group_size=8, group_dim=group_dim)
    tensors = [random_tensor("coded_scales", scheme, Shape2D(16, 16), i) for i in range(2)]
    along, across = (1, 0) if group_dim == "in_features" else (0, 1)
    assert coded_format.CODEC.cat(tensors, along).format == "binary_coding"
    assert coded_format.CODEC.cat(tensors, across).format == "coded_scales"


@pytest.mark.parametrize(
    ("num_bits", "group_size", "most"),
    [(3, 64, 3.35), (2, 64, 2.35), (2, 32, 2.75), (4, 96, 4.35), (4, 64, 4.70)],
)
def test_bits_of_a_weight_576_wide(num_bits, group_size, most):
    shape = Shape2D(576, 576)
    scheme = WeightScheme(num_bits=num_bits, group_size=group_size)
    size = sum(
        np.prod(spec.shape) * getattr(torch, spec.dtype).itemsize
        for spec in coded_format.CODEC.layout(scheme, shape).values()
    )
    codes = sum(coded_scales.code_widths(num_bits))
    assert 8 * size / (576 * 576) == pytest.approx(num_bits + codes / group_size + 16 / 576)
    assert 8 * size / (576 * 576) <= most
