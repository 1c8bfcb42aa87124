"""Second moments of both streams, and what a token cap does to them."""

from typing import Any

import pytest
import torch

from qtool.walk.statistics import RowGroups
from qtool.walk.streams import Visit, make_streams
from qtool.walk.sums import SumOptions, measure_inputs
from tests.helpers import normal

WIDTH, INPUTS = 6, 9


class FakeBlock:
    """Maps its input to that of the linear by a matrix; the residual stream is half its input."""

    def __init__(self, matrix):
        self.matrix = matrix

    def inputs_of(self, _linear, hidden, _batch):
        return hidden.flatten(0, -2) @ self.matrix

    def around(self, linear, hidden, batch):
        return self.inputs_of(linear, hidden, batch), 0.5 * hidden.flatten(0, -2)


@pytest.fixture
def blocks() -> tuple[Any, Any]:
    matrix = normal(WIDTH, INPUTS, seed=1)
    return FakeBlock(matrix), FakeBlock(matrix + 0.1 * normal(WIDTH, INPUTS, seed=2))


@pytest.fixture
def streams():
    hidden = [normal(2, 10, WIDTH, seed=seed) for seed in range(5)]
    hidden[1][1, 4] *= 500  # a massive activation among the training tokens
    made = make_streams(hidden, 4, device="cpu", directory=None)
    for batch in made.quantized:
        batch += 0.1 * normal(*batch.shape, seed=9)
    return made


def by_hand(blocks, streams, residuals, cap):
    """Return x, drift and residual drift of all training tokens, weighted."""
    original = torch.cat([blocks[0].inputs_of("", h, 0) for h in streams.original[:4]])
    rows = []
    start = 0
    for first, second, (kept, lost) in zip(
        streams.original[:4], streams.quantized[:4], residuals, strict=True
    ):
        x = blocks[1].inputs_of("", second, 0)
        weights = torch.ones(len(x), 1)
        if cap is not None:
            norms = x.norm(dim=1, keepdim=True)
            weights = (cap * norms.median() / norms).clamp(max=1)
        drift = original[start : start + len(x)] - x
        start += len(x)
        rows.append((weights * x, weights * drift, weights * (kept(first) - lost(second))))
    return [torch.cat(parts) for parts in zip(*rows, strict=True)]


@pytest.mark.parametrize("writer", ["attention", "mlp"])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_all_moments_are_of_equally_weighted_tokens(blocks, streams, writer, cap):
    """A capped token counts alike in H and in the drifts: otherwise the shift overshoots for it."""
    options = SumOptions(residual=("attention", "mlp"), token_cap=cap)
    (both,) = measure_inputs(writer, Visit(blocks[0], blocks[1], streams), options)
    measured = both.train
    share = 0.5 if writer == "mlp" else 1.0
    flat = (lambda h: share * h.flatten(0, -2),) * 2
    x, drift, residual = by_hand(blocks, streams, [flat] * 4, cap)
    means = [measured.mean("xx"), measured.mean("dx"), measured.mean("ex")]
    for got, left in zip(means, (x, drift, residual), strict=True):
        torch.testing.assert_close(got, left.T @ x / len(x), rtol=1e-4, atol=1e-4)
    assert measured.num_tokens == len(x) == 80


@pytest.mark.parametrize("cap", [None, 3.0])
def test_a_group_of_rows_has_all_moments_weighed_alike_and_its_rows_of_the_residual(
    blocks, streams, cap
):
    weights = (8 * torch.rand(100, 2, generator=torch.Generator().manual_seed(3))).half()
    groups = RowGroups((0, 4, WIDTH), weights)
    options = SumOptions(residual=("attention", "mlp"), token_cap=cap, groups=groups)
    parts = measure_inputs("mlp", Visit(blocks[0], blocks[1], streams), options)
    flat = (lambda h: 0.5 * h.flatten(0, -2),) * 2
    x, drift, residual = by_hand(blocks, streams, [flat] * 4, cap)
    assert [part.rows for part in parts] == [slice(0, 4), slice(4, WIDTH)]
    for part, weight in zip(parts, weights[:80].float().split(1, 1), strict=True):
        means = [part.train.mean("xx"), part.train.mean("dx"), part.train.mean("ex")]
        for got, left in zip(means, (x, drift, residual[:, part.rows]), strict=True):
            expected = (weight * left).T @ x / len(x)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
        assert part.train.num_tokens == 80 and part.held_out.num_tokens == 20
    held_out = blocks[1].inputs_of("", streams.quantized[4], 0)
    if cap is None:
        expected = (weights[80:, :1].float() * held_out).T @ held_out / 20
        torch.testing.assert_close(parts[0].held_out.mean("xx"), expected, rtol=1e-4, atol=1e-3)


def test_linears_off_the_residual_stream_have_no_residual(blocks, streams):
    (measured,) = measure_inputs("linear", Visit(blocks[0], blocks[1], streams), SumOptions())
    for part in (measured.train, measured.held_out):
        assert not {"ex", "ed", "ee"} & part.sums.keys()
    assert measured.held_out.num_tokens == 20
    assert measured.tokens_per_input == pytest.approx(80 / INPUTS)


def test_streams_are_advanced_in_place_and_don_t_share_memory():
    hidden = [normal(1, 4, WIDTH)]
    streams = make_streams(hidden, 1, device="cpu", directory=None)

    class Times:
        def __init__(self, factor):
            self.factor = factor

        def run(self, batch, _index):
            return self.factor * batch

    times: Any = Times
    streams.advance(times(2.0), times(3.0))
    assert torch.equal(streams.original[0], 2 * hidden[0])
    assert torch.equal(streams.quantized[0], 3 * hidden[0])
