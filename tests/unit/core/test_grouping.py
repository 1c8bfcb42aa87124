import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.core import grouping
from qtool.scheme import GROUP_DIMS, Shape2D, WeightScheme
from tests.helpers import normal

sizes = st.one_of(st.none(), st.integers(1, 40))
dims = st.sampled_from(GROUP_DIMS)
widths = st.integers(1, 33)


def scheme_of(group_size, group_dim):
    return WeightScheme(num_bits=2, group_size=group_size, group_dim=group_dim)


@given(rows=st.integers(1, 4), length=widths, group_size=sizes)
def test_join_inverts_split_for_any_length_and_group_size(rows, length, group_size):
    values = normal(rows, length)
    groups = grouping.split(values, group_size)
    assert groups.shape[-1] == (group_size or length)
    assert torch.equal(grouping.join(groups, length), values)


@given(length=widths, group_size=sizes)
def test_padding_is_zero_and_marked_as_not_real(length, group_size):
    groups = grouping.split(torch.ones(length), group_size)
    real = grouping.valid(length, group_size, torch.device("cpu"))
    assert int(real.sum()) == length
    assert torch.equal(groups, real.float())


@given(out_features=widths, in_features=widths, group_size=sizes, group_dim=dims)
def test_spread_gives_each_weight_the_parameter_of_its_group(
    out_features, in_features, group_size, group_dim
):
    shape, scheme = Shape2D(out_features, in_features), scheme_of(group_size, group_dim)
    rows, groups = scheme.num_rows(shape), scheme.num_groups(shape)
    parameters = torch.arange(rows * groups).view(rows, groups)
    spread = grouping.spread(grouping.to_stored(parameters, scheme), scheme, shape)
    size = group_size or scheme.grouped_length(shape)
    for o in range(out_features):
        for i in range(in_features):
            row, place = (o, i) if group_dim == "in_features" else (i, o)
            assert spread[o, i] == parameters[row, place // size]


@given(out_features=widths, in_features=widths, group_size=sizes, group_dim=dims)
def test_rows_of_groups_count_as_the_scheme_says(out_features, in_features, group_size, group_dim):
    shape, scheme = Shape2D(out_features, in_features), scheme_of(group_size, group_dim)
    groups = grouping.split(grouping.to_rows(normal(*shape), scheme), scheme.group_size)
    assert groups.shape[:2] == (scheme.num_rows(shape), scheme.num_groups(shape))


@pytest.mark.parametrize("group_dim", GROUP_DIMS)
def test_to_stored_is_its_own_inverse(group_dim):
    scheme, parameters = scheme_of(4, group_dim), normal(3, 5, 7)
    twice = grouping.to_stored(grouping.to_stored(parameters, scheme), scheme)
    assert torch.equal(twice, parameters)
    assert twice.is_contiguous()


@pytest.mark.parametrize("group_dim", GROUP_DIMS)
def test_spread_takes_leading_dimensions_of_planes(group_dim):
    shape, scheme = Shape2D(10, 6), scheme_of(4, group_dim)
    rows, groups = scheme.num_rows(shape), scheme.num_groups(shape)
    stored = grouping.to_stored(normal(3, rows, groups), scheme)
    assert torch.equal(
        grouping.spread(stored, scheme, shape)[1], grouping.spread(stored[1], scheme, shape)
    )
