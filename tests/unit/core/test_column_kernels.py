"""The column loop as one launch does what it does in torch."""

import pytest
import torch

from qtool.core import affine, column_loop, dint
from qtool.core.column_grids import ColumnGrid
from qtool.core.grids import AffineGrid, Span
from tests.helpers import normal

pytestmark = pytest.mark.gpu
FITS = {AffineGrid: affine.fit_min_max, dint.DintGrid: dint.fit_dint}


@pytest.mark.parametrize("descends", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", FITS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("num_bits", [3, 4, 8])
def test_a_launch_walks_columns_as_torch_does(kind, num_bits, symmetric, descends):
    rows, columns = 301, 48
    groups = normal(rows, 2, columns // 2)
    grid = {"num_bits": num_bits, "symmetric": symmetric, "clip_ratio": 0.7}
    scales, zeros = (part.T.float().cuda() for part in FITS[kind](groups, **grid))
    made = kind(scales, zeros, num_bits, Span(1, rows))
    tables = made.tables([column % 2 for column in range(columns)])
    mixing = torch.eye(columns) + 0.2 * normal(columns, columns, seed=1)
    matrix, work = (mixing @ mixing.T).cuda(), normal(columns, rows, seed=2).cuda()
    levels = None
    if descends:
        levels = work.clone()
        for column, values in enumerate(work):
            levels[column] = made.pick(tables, column, values)[1]
    check_walk(made.pick, work, matrix, tables, levels)


@pytest.mark.parametrize("descends", [False, True])
@pytest.mark.parametrize("size", [1, 64, 100])
@pytest.mark.parametrize("num_bits", [1, 3, 5])
def test_a_launch_walks_columns_whose_rows_share_levels(num_bits, size, descends):
    rows, columns = 301, 48
    parameters = normal(columns, num_bits + 1, -(-rows // size)).cuda()
    grid = ColumnGrid(parameters, offset=True, span=Span(size, rows))
    tables = grid.tables(list(range(columns)))
    mixing = torch.eye(columns) + 0.2 * normal(columns, columns, seed=1)
    matrix, work = (mixing @ mixing.T).cuda(), normal(columns, rows, seed=2).cuda()
    levels = None
    if descends:
        picked = [grid.pick(tables, column, values)[1] for column, values in enumerate(work)]
        levels = torch.stack(picked)
    check_walk(grid.pick, work, matrix, tables, levels)


def check_walk(pick, work, matrix, tables, levels):
    from qtool.core import column_kernels

    assert column_kernels.supports(pick, work, tables)
    found = column_kernels.walk(pick, work, matrix, tables, levels)
    expected = column_loop.loop(pick, work, matrix, tables, levels)
    # Strips of columns are summed in another order: a tie may fall to the other side.
    assert float((found[0] != expected[0]).float().mean()) < 0.01
    same = found[0] == expected[0]
    torch.testing.assert_close(found[1][same], expected[1][same])
