import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.core import affine, grouping
from qtool.errors import SchemeError
from qtool.formats import affine as affine_format
from qtool.formats import binary_coding as binary_format
from qtool.scheme import GROUP_DIMS, Shape2D, WeightScheme
from tests.helpers import dequantized, normal

widths = st.integers(1, 40)


def affine_tensor(scheme: WeightScheme, shape: Shape2D, seed: int = 0):
    """Return an affine weight with random codes, scales and zero points."""
    rows, groups = scheme.num_rows(shape), scheme.num_groups(shape)
    generator = torch.Generator().manual_seed(seed)
    size = scheme.group_size or scheme.grouped_length(shape)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(2**scheme.num_bits, shape, generator=generator).to(torch.uint8)

    scales = (normal(rows, groups, seed=seed).abs() + 2**-10).half()
    return affine_format.encode_affine(
        codes(rows, groups, size), scales, codes(rows, groups), scheme, shape
    )


@given(
    num_bits=st.integers(1, 8),
    group_size=st.one_of(st.none(), st.integers(1, 48)),
    group_dim=st.sampled_from(GROUP_DIMS),
    out_features=widths,
    in_features=widths,
    symmetric=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_affine_weight_is_its_binary_coding_form_bit_for_bit(
    num_bits, group_size, group_dim, out_features, in_features, symmetric, seed
):
    scheme = WeightScheme(
        num_bits=num_bits, group_size=group_size, group_dim=group_dim, symmetric=symmetric
    )
    tensor = affine_tensor(scheme, Shape2D(out_features, in_features), seed)
    binary = binary_format.from_affine(tensor, torch.float64)
    assert binary.format == "binary_coding"
    assert torch.equal(dequantized(tensor, torch.float64), dequantized(binary, torch.float64))
    assert torch.equal(tensor.parts["codes"], binary.parts["bit_planes"])


@pytest.mark.parametrize("num_bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_float16_conversion_has_the_layout_of_the_format(num_bits, symmetric):
    scheme = WeightScheme(num_bits=num_bits, group_size=16, symmetric=symmetric)
    tensor = affine_tensor(scheme, Shape2D(5, 40))
    binary = binary_format.from_affine(tensor, torch.float16)
    layout = binary_format.CODEC.layout(binary.scheme, binary.shape)
    assert {name: tuple(part.shape) for name, part in binary.parts.items()} == {
        name: spec.shape for name, spec in layout.items()
    }
    exact, rounded = dequantized(tensor, torch.float64), dequantized(binary, torch.float64)
    assert float((exact - rounded).abs().max()) <= 2**-10 * float(exact.abs().max()) + 0.25


def test_from_affine_refuses_another_format():
    tensor = affine_tensor(WeightScheme(num_bits=4), Shape2D(4, 4))
    binary = binary_format.from_affine(tensor, torch.float16)
    with pytest.raises(SchemeError, match="takes an affine weight; this one is binary_coding"):
        binary_format.from_affine(binary, torch.float64)


def test_one_bit_symmetric_affine_is_refused_with_the_alternative():
    scheme = WeightScheme(num_bits=1, symmetric=True)
    with pytest.raises(SchemeError, match="Use 'bcq' for 1 bit"):
        affine_format.CODEC.layout(scheme, Shape2D(4, 4))


@pytest.mark.parametrize("group_dim", GROUP_DIMS)
def test_zero_points_come_back_in_the_shape_of_the_scales(group_dim):
    scheme = WeightScheme(num_bits=5, group_size=8, group_dim=group_dim)
    shape = Shape2D(20, 36)
    groups = grouping.split(grouping.to_rows(normal(*shape), scheme), 8)
    scales, zeros = affine.fit_min_max(groups, num_bits=5, symmetric=False, clip_ratio=1.0)
    codes = affine.nearest_codes(groups, scales, zeros, num_bits=5)
    tensor = affine_format.encode_affine(codes, scales, zeros, scheme, shape)
    got = affine_format.zero_points(tensor)
    assert got.shape == tensor.parts["scales"].shape
    assert torch.equal(grouping.to_stored(got, scheme), zeros)
