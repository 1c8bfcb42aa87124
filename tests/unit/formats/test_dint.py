"""Format `dint`: the forms in which kernels take its weights are the same weights."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.core.grouping import spread
from qtool.errors import SchemeError
from qtool.formats import dint
from qtool.runtime.backends.cuda.centers import planes_of, scheme_of_planes, weight_of
from qtool.scheme import GROUP_DIMS, Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import dequantized

schemes = st.builds(
    WeightScheme,
    num_bits=st.integers(3, 7),
    group_size=st.one_of(st.none(), st.integers(1, 40)),
    group_dim=st.sampled_from(GROUP_DIMS),
    symmetric=st.booleans(),
)
shapes = st.builds(Shape2D, st.integers(1, 36), st.integers(1, 36))
seeds = st.integers(0, 10_000)
"""Of arbitrary bits: zero points that no writer writes are among them."""


@given(scheme=schemes, shape=shapes, seed=seeds)
def test_doubled_codes_times_their_scales_are_the_weight(scheme, shape, seed):
    if scheme.num_bits == 7 and not scheme.symmetric:
        scheme = replace(scheme, num_bits=6)
    tensor = random_tensor("dint", scheme, shape, seed)
    codes, scales = dint.doubled_codes(tensor)
    assert (codes.dtype, tuple(codes.shape)) == (torch.int8, shape)
    assert (scales.dtype, scales.shape) == (torch.float32, tensor.parts["scales"].shape)
    weight = codes.double() * spread(scales.double(), scheme, shape)
    assert torch.equal(weight, dequantized(tensor, torch.float64))


@pytest.mark.parametrize(("num_bits", "symmetric"), [(7, False), (8, False), (8, True)])
def test_doubled_codes_that_int8_does_not_hold_are_refused(num_bits, symmetric):
    scheme = WeightScheme(num_bits=num_bits, group_size=8, symmetric=symmetric)
    tensor = random_tensor("dint", scheme, Shape2D(4, 16), 0)
    with pytest.raises(SchemeError, match=f"of {num_bits} bits don't fit int8; those of"):
        dint.doubled_codes(tensor)


@given(scheme=schemes, shape=shapes, seed=seeds)
def test_one_plane_more_makes_it_an_affine_weight(scheme, shape, seed):
    tensor = random_tensor("dint", scheme, shape, seed)
    wider = dint.to_affine(tensor)
    assert (wider.format, wider.scheme.num_bits) == ("affine", scheme.num_bits + 1)
    assert torch.equal(dequantized(wider, torch.float64), dequantized(tensor, torch.float64))


@given(scheme=schemes, shape=shapes, seed=seeds)
def test_planes_of_the_kernels_are_the_weight(scheme, shape, seed):
    """Random scales are multiples of 1/32: a quarter of one is exact in float16."""
    tensor = random_tensor("dint", scheme, shape, seed)
    planes = planes_of(tensor)
    assert planes.scheme == scheme_of_planes(tensor)
    assert torch.equal(weight_of(planes), dequantized(tensor))


def test_two_bits_are_refused():
    with pytest.raises(SchemeError, match="3 to 8 bits, not 2"):
        dint.CODEC.layout(WeightScheme(num_bits=2), Shape2D(4, 4))


def test_a_table_of_sixteen_entries_decodes_four_bits():
    """What a kernel would look codes up in."""
    codes = torch.arange(16, dtype=torch.uint8).view(1, 1, 16)
    scheme, shape = WeightScheme(num_bits=4, group_size=16, symmetric=True), Shape2D(1, 16)
    one = torch.ones(1, 1, dtype=torch.float16)
    tensor = dint.encode_dint(codes, one, torch.zeros(1, 1, dtype=torch.uint8), scheme, shape)
    table, scales = dint.doubled_codes(tensor)
    assert table.tolist() == [[-12, -10, -8, -6, -4, -2, 0, 2, 4, 6, 8, 10, 12, 14, 1, -1]]
    assert scales.tolist() == [[0.5]]
