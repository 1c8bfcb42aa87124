"""Planes whose scales have changed places, as adapters leave them, put in order again."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.base import QuantizedTensor
from qtool.formats.binary_coding import CODEC, planes_in_order
from qtool.scheme import GROUP_DIMS, Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import dequantized

SHAPE = Shape2D(12, 40)


def unordered(scheme: WeightScheme, seed: int) -> QuantizedTensor:
    tensor = random_tensor("binary_coding", scheme, SHAPE, seed)
    scales = tensor.parts["plane_scales"].abs()
    order = torch.rand(scales.shape, generator=torch.Generator().manual_seed(seed)).argsort(0)
    parts = {**tensor.parts, "plane_scales": scales.gather(0, order)}
    return QuantizedTensor(tensor.format, scheme, SHAPE, parts)


schemes = st.builds(
    WeightScheme,
    num_bits=st.integers(1, 5),
    group_size=st.sampled_from([7, 16, None]),
    group_dim=st.sampled_from(GROUP_DIMS),
    symmetric=st.booleans(),
)


@given(scheme=schemes, seed=st.integers(0, 99))
def test_planes_in_order_are_the_same_weight_and_so_is_where_learning_begins(scheme, seed):
    tensor = unordered(scheme, seed)
    expected = dequantized(tensor, torch.float64)
    found = planes_in_order(tensor)
    torch.testing.assert_close(dequantized(found, torch.float64), expected, rtol=0, atol=1e-12)
    scales = found.parts["plane_scales"]
    assert bool((scales[:-1] >= scales[1:]).all()), "as docs/format.md has it"
    assert CODEC.trainable is not None
    begun = CODEC.trainable(tensor)
    stored = begun.stored(begun.parameters, begun.codes)
    torch.testing.assert_close(dequantized(stored, torch.float64), expected, rtol=0, atol=1e-12)


def test_what_is_in_order_is_left_alone():
    tensor = planes_in_order(unordered(WeightScheme(num_bits=3, group_size=16), 0))
    assert planes_in_order(tensor) is tensor
