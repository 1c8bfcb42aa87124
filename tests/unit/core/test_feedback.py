"""Error feedback, coordinate descent and refits: the identities they must satisfy."""

import itertools

import pytest
import torch

from qtool.core import dint, grouping, hessian, polish
from qtool.core.binary_feedback import solve_columns
from qtool.core.column_grids import ColumnGrid
from qtool.core.error_feedback import encode_columns, feed_forward, scaled_errors
from qtool.core.grids import AffineGrid, BinaryGrid, Span

COLUMNS, ROWS, SIZE = 24, 7, 8
EDGES = [0, 8, 16, 24]


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(COLUMNS, ROWS, generator=generator)
    inputs = torch.randn(200, COLUMNS, generator=generator) * torch.linspace(0.2, 3, COLUMNS)
    mixed = inputs + 0.5 * inputs.roll(1, dims=1)
    return weight, mixed.T @ mixed / 200


def loss_per_row(weight, levels, matrix):
    error = levels - weight
    return ((matrix @ error) * error).sum(0)


def factorized(matrix, damping):
    factor = hessian.factorize(matrix, damping=damping)
    assert factor is not None
    return factor


def grids(weight):
    groups = weight.unflatten(0, (-1, SIZE))
    low, high = groups.amin(1), groups.amax(1)
    scales = (high - low) / 3
    affine = AffineGrid(scales, (-low / scales).round().clamp(0, 3), 2, Span(1, ROWS))
    parameters = torch.stack([scales, scales / 2, (low + high) / 2], dim=1)
    return [affine, BinaryGrid(parameters, offset=True), dint_grid(groups)]


def dint_grid(groups):
    scales, zeros = dint.fit_dint(groups.mT, num_bits=3, symmetric=False, clip_ratio=1)
    return dint.DintGrid(scales.float(), zeros.float(), 3, Span(1, ROWS))


def run_feedback(weight, factor, grid, edges=EDGES):
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    levels = torch.empty_like(weight)
    squared = []

    def solve(start, stop, block, upper):
        tables = grid.tables([start // SIZE] * (stop - start))
        codes[start:stop], levels[start:stop] = encode_columns(block, upper, tables, grid.pick)
        errors = scaled_errors(block, levels[start:stop], upper)
        squared.append(errors.square().sum())
        return errors

    feed_forward(weight.clone(), factor.upper, edges, solve)
    return codes, levels, sum(squared)


def test_factor_is_upper_triangular_and_inverts_the_damped_hessian(layer):
    factor = factorized(layer[1], 0.01)
    upper = factor.upper.double()
    assert torch.equal(upper, upper.triu())
    product = upper.T @ upper @ factor.hessian.double()
    torch.testing.assert_close(product, torch.eye(COLUMNS).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", [0, 1])
def test_sum_of_squared_errors_is_the_loss(layer, kind):
    weight, matrix = layer
    factor = factorized(matrix, 0.01)
    _, levels, squared = run_feedback(weight, factor, grids(weight)[kind])
    loss = loss_per_row(weight, levels, factor.hessian).sum()
    assert float(squared) == pytest.approx(float(loss), rel=1e-3)


@pytest.mark.parametrize("kind", [0, 1])
def test_diagonal_hessian_gives_round_to_nearest(layer, kind):
    weight, matrix = layer
    factor = factorized(torch.diag(matrix.diagonal()), 0.01)
    grid = grids(weight)[kind]
    codes, _, _ = run_feedback(weight, factor, grid)
    nearest = [
        grid.pick(grid.tables([column // SIZE] * SIZE), column % SIZE, weight[column])[0]
        for column in range(COLUMNS)
    ]
    assert torch.equal(codes, torch.stack(nearest))


def test_result_does_not_depend_on_the_blocks(layer):
    weight, matrix = layer
    factor = factorized(matrix, 0.01)
    coarse = run_feedback(weight, factor, grids(weight)[0])[0]
    fine = run_feedback(weight, factor, grids(weight)[0], [0, 4, 8, 12, 16, 20, 24])[0]
    assert torch.equal(coarse, fine)


@pytest.mark.parametrize("kind", [0, 1])
def test_no_step_of_the_polish_raises_the_loss_of_any_row(layer, kind):
    weight, matrix = layer
    factor = factorized(matrix, 0.01)
    grid = grids(weight)[kind]
    codes, levels, _ = run_feedback(weight, factor, grid)
    gradient = polish.residual(weight, levels, factor.hessian)
    losses = [loss_per_row(weight, levels, factor.hessian)]
    descent = polish.Descent(grid, EDGES, codes, levels, gradient, factor.hessian)
    for step in (descent.descend_codes, descent.refit, descent.descend_codes, descent.refit):
        step()
        losses.append(loss_per_row(weight, levels, factor.hessian))
        drift = gradient - polish.residual(weight, levels, factor.hessian)
        assert float(drift.abs().max()) < 1e-3
    for before, after in itertools.pairwise(losses):
        assert bool((after <= before * (1 + 1e-4) + 1e-6).all())
    assert float(losses[-1].sum()) < 0.98 * float(losses[0].sum())


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("binary", [False, True])
def test_polish_of_single_column_groups_never_raises_the_loss(layer, size, binary):
    weight, matrix = layer
    factor = factorized(matrix, 0.01)
    span = Span(size, ROWS)
    padded = grouping.split(weight, size)
    low, high = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
    scales = (high - low).clamp(min=1e-3) / 3
    grid = AffineGrid(scales, (-low / scales).round().clamp(0, 3), 2, span)
    grid = column_grid(weight, size) if binary else grid
    edges = list(range(COLUMNS + 1))
    tables = grid.tables(list(range(COLUMNS)))
    codes = torch.stack([grid.pick(tables, c, weight[c])[0] for c in range(COLUMNS)])
    levels = polish.all_values(grid, edges, codes)
    gradient = polish.residual(weight, levels, factor.hessian)
    losses = [float(loss_per_row(weight, levels, factor.hessian).sum())]
    descent = polish.Descent(grid, edges, codes, levels, gradient, factor.hessian)
    for step in (descent.refit, descent.descend_codes, descent.refit, descent.descend_codes):
        step()
        losses.append(float(loss_per_row(weight, levels, factor.hessian).sum()))
        torch.testing.assert_close(levels, polish.all_values(grid, edges, codes))
        drift = gradient - polish.residual(weight, levels, factor.hessian)
        assert float(drift.abs().max()) < 1e-3
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]


def column_grid(weight, size, *, offset=True):
    """Return two planes per column and `size` rows, whatever they are worth."""
    groups = grouping.split(weight, size)
    scale, middle = groups.abs().amax(-1), groups.mean(-1) * offset
    return ColumnGrid(
        torch.stack([scale / 2, scale / 4, middle], dim=1), offset=offset, span=Span(size, ROWS)
    )


@pytest.mark.parametrize("size", [2, 3, 7, 9])
def test_the_nearest_levels_of_a_column_are_picked(layer, size):
    weight, grid = layer[0], column_grid(layer[0], size)
    tables = grid.tables([5, 2])
    for place, column in enumerate((5, 2)):
        codes, levels = grid.pick(tables, place, weight[column])
        every = torch.arange(4, dtype=torch.uint8).unsqueeze(-1).expand(-1, ROWS)
        possible = grid.values_of(torch.full((4,), column), every)
        distance = (possible - weight[column]).abs()
        torch.testing.assert_close((levels - weight[column]).abs(), distance.min(0).values)
        torch.testing.assert_close(levels, possible.gather(0, codes.long().unsqueeze(0))[0])


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_columns_that_are_fitted_together_are_at_the_minimum(layer, size, offset):
    weight, matrix = layer
    factor = factorized(matrix, 0.01)
    grid, columns = column_grid(weight, size, offset=offset), torch.arange(COLUMNS)
    codes = torch.randint(0, 4, weight.shape, dtype=torch.uint8)
    before = grid.values_of(columns, codes)
    grid.refit(columns, codes, factor.hessian, polish.residual(weight, before, factor.hessian))
    after = grid.values_of(columns, codes)
    gradient = polish.residual(weight, after, factor.hessian)
    slopes = grid.span.pool((grid.basis(0, codes) * gradient).permute(2, 0, 1))
    assert float(slopes.abs().max()) < 1e-3 * float(gradient.abs().max())
    losses = [loss_per_row(weight, levels, factor.hessian).sum() for levels in (before, after)]
    assert losses[1] < 0.7 * losses[0]
    assert offset or not bool(grid.parameters[:, -1].any())


@pytest.mark.parametrize("size", [2, 7])
def test_levels_of_columns_fitted_under_feedback_beat_those_of_the_start(layer, size):
    weight, matrix = layer
    factor = factorized(matrix, 0.01)
    order = torch.arange(COLUMNS).flip(0)
    reordered = hessian.factorize(matrix, damping=0.01, order=order)
    assert reordered is not None
    losses = []
    for iterations in (1, 5):
        grid = column_grid(weight, size)
        work = weight[order].contiguous()
        codes = solve_columns(work, reordered.upper, grid, order, iterations=iterations)
        levels = grid.values_of(torch.arange(COLUMNS), codes[order.argsort()])
        losses.append(float(loss_per_row(weight, levels, factor.hessian).sum()))
    nearest = column_grid(weight, size)
    picked = [nearest.pick(nearest.tables([c]), 0, weight[c])[1] for c in range(COLUMNS)]
    plain = float(loss_per_row(weight, torch.stack(picked), factor.hessian).sum())
    assert losses[1] <= losses[0] < 0.8 * plain


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10])
def test_pool_sums_what_expand_repeats(size):
    span, values = Span(size, ROWS), torch.arange(float(ROWS * 2)).view(ROWS, 2)
    pooled = span.pool(values)
    expected = [values[i : i + size].sum(0) for i in range(0, ROWS, size)]
    assert torch.equal(pooled, torch.stack(expected))
    assert torch.equal(span.expand(torch.arange(len(pooled))), torch.arange(ROWS) // size)


@pytest.mark.parametrize("scale", [0.25, 4.0])
def test_scale_of_the_hessian_does_not_matter(layer, scale):
    weight, matrix = layer
    one, other = (factorized(m, 0.01) for m in (matrix, matrix * scale))
    codes = [run_feedback(weight, factor, grids(weight)[0])[0] for factor in (one, other)]
    assert torch.equal(*codes)


def test_orders_are_permutations_and_group_order_keeps_groups_together(layer):
    order = hessian.group_order(layer[1], SIZE)
    assert sorted(order.tolist()) == list(range(COLUMNS))
    for start in range(0, COLUMNS, SIZE):
        assert len({int(column) // SIZE for column in order[start : start + SIZE]}) == 1
    assert sorted(hessian.act_order(layer[1]).tolist()) == list(range(COLUMNS))


def test_short_last_group_stays_last(layer):
    assert hessian.group_order(layer[1], 10)[20:].sort().values.tolist() == [20, 21, 22, 23]


def test_loud_token_is_capped_and_quiet_ones_are_not():
    x = torch.ones(9, 4)
    x[3] *= 1000
    capped = x * hessian.token_weights(x, 10.0)
    assert float(capped[3].norm()) == pytest.approx(20.0)
    assert torch.equal(capped[:3], x[:3])
