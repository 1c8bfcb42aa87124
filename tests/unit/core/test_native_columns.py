"""The column loops on a processor, against what each column must be in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.core import column_loop
from qtool.core.grids import AffineGrid, BinaryGrid, Span
from qtool.core.native import building, columns
from tests.helpers import normal

needs_compiler = pytest.mark.skipif(building.compiler() is None, reason="there is no C compiler")


def binary_grid(rows, bits):
    scales = normal(1, bits, rows, seed=1).abs() * 0.3
    return BinaryGrid(torch.cat([scales, normal(1, 1, rows, seed=2) / 9], 1), offset=True)


def affine_grid(rows, bits):
    zeros = (normal(1, rows, seed=3).abs() * 3).round()
    return AffineGrid(normal(1, rows, seed=4).abs() * 0.2 + 0.01, zeros, bits, Span(1, rows))


def problem(grid, num_columns, rows, *, descends):
    """Return arguments of `walk_columns`, and all levels that each row may use."""
    work, factor = normal(num_columns, rows, seed=5), normal(2 * num_columns, num_columns, seed=6)
    matrix, tables = factor.T @ factor / num_columns + 0.1, grid.tables([0] * num_columns)
    bits = grid.num_bits if isinstance(grid, AffineGrid) else grid.parameters.shape[1] - 1
    every = torch.arange(2**bits, dtype=torch.uint8)[:, None].expand(-1, rows).contiguous()
    before = grid.values(0, every[:1].expand(num_columns, -1).contiguous()) if descends else None
    return (grid.pick, work, matrix, tables, before), grid.values(0, every)


@needs_compiler
@settings(max_examples=12, deadline=None)
@given(
    num_columns=st.integers(1, 40),
    rows=st.integers(1, 150),
    bits=st.integers(1, 6),
    is_binary=st.booleans(),
    descends=st.booleans(),
)
def test_each_column_gets_the_level_nearest_to_what_those_before_it_left(
    num_columns, rows, bits, is_binary, descends
):
    grid = (binary_grid if is_binary else affine_grid)(rows, bits)
    arguments, every = problem(grid, num_columns, rows, descends=descends)
    _, work, matrix, _, before = arguments
    codes, levels = columns.walk_natively(*arguments)
    assert torch.equal(levels, every.gather(0, codes.long()))
    left, matrix = work.double(), matrix.double()
    for column in range(num_columns):
        old = left[column] if before is None else before[column].double()
        value = old if before is None else old - left[column] / matrix[column, column]
        least = (every.double() - value).abs().amin(0)
        size = 1 + left.abs().amax(0) + value.abs()
        assert bool(((levels[column] - value).abs() <= least + 1e-5 * size).all())
        step = levels[column].double() - old
        left = left + matrix[column][:, None] * step


@needs_compiler
@pytest.mark.parametrize("descends", [False, True])
@pytest.mark.parametrize("make", [binary_grid, affine_grid])
def test_codes_are_those_of_plain_torch(make, descends):
    grid = make(300, 3)
    arguments, _ = problem(grid, 32, 300, descends=descends)
    assert columns.runs_natively(grid.pick, arguments[1], arguments[3])
    found, expected = columns.walk_natively(*arguments), column_loop.loop(*arguments)
    assert float((found[0] != expected[0]).double().mean()) <= 1e-3


@needs_compiler
def test_threads_do_not_change_a_bit():
    grid = binary_grid(1000, 3)
    arguments, _ = problem(grid, 64, 1000, descends=False)
    before = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(columns.walk_natively(*arguments)[1])
    torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)


def test_without_a_library_torch_does_it(monkeypatch):
    monkeypatch.setattr(column_loop, "has_native_loop", lambda: False)
    monkeypatch.setattr(column_loop, "walk_natively", pytest.fail)
    grid = binary_grid(5, 2)
    arguments, _ = problem(grid, 4, 5, descends=False)
    codes, _ = column_loop.walk_columns(*arguments)
    assert torch.equal(codes, column_loop.loop(*arguments)[0])


def test_more_levels_than_it_holds_are_for_torch():
    grid = binary_grid(5, 7)
    arguments, _ = problem(grid, 4, 5, descends=False)
    assert not columns.runs_natively(grid.pick, arguments[1], arguments[3])
    column_loop.walk_columns(*arguments)
