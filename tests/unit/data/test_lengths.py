"""Sequence-length matching: budgets, distributions, and what isn't known."""

import pytest

from qtool.data import lengths
from qtool.errors import DataError

SKEWED = [20] * 60 + [100] * 30 + [900] * 10


def test_budget_does_not_depend_on_the_lengths():
    for wanted in (SKEWED, [64], [2000, 2100]):
        drawn = lengths.match_lengths(wanted, num_tokens=100_000, longest=2048, seed=0)
        assert sum(drawn) == pytest.approx(100_000, rel=0.05)


def test_drawn_lengths_have_the_wanted_distribution():
    drawn = lengths.match_lengths(SKEWED, num_tokens=100_000, longest=2048, seed=0)
    edges = [0, 50, 500, 1000]
    wanted = lengths.histogram(SKEWED, edges)
    assert lengths.histogram(drawn, edges) == pytest.approx(wanted, abs=0.02)


def test_same_seed_same_order_other_seed_other_order():
    first, again, other = (
        lengths.match_lengths(SKEWED, num_tokens=20_000, longest=2048, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)


def test_no_length_exceeds_the_context_or_is_too_short():
    drawn = lengths.match_lengths([1, 5000], num_tokens=10_000, longest=512, seed=0)
    assert set(drawn) == {lengths.SHORTEST_SAMPLE, 512}


def test_bins_hold_every_length():
    edges = lengths.bin_edges(SKEWED)
    assert sum(lengths.histogram(SKEWED, edges)) == pytest.approx(1.0)


def test_unknown_task_names_the_known_ones():
    with pytest.raises(DataError, match=r"No 'mmlus'.*Did you mean 'mmlu'.*--lengths"):
        lengths.task_lengths(None, ["mmlus"])


@pytest.mark.parametrize("text", ["", "12 x", "0", "-3", "1.5", "7\n\n1e3", "9" * 5000, "1_0"])
def test_file_that_holds_no_lengths_is_refused(tmp_path, text):
    path = tmp_path / "lengths.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=r"lengths\.txt .* must hold"):
        lengths.read_lengths(path)


def test_lengths_with_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "lengths.txt"
    path.write_bytes(b"\xef\xbb\xbf12\r\n 7 8\r\n")
    assert lengths.read_lengths(path) == [12, 7, 8]


def test_quantiles_are_lengths_that_occur():
    assert lengths.quantiles(SKEWED) == (20, 20, 900)
    assert lengths.quantiles([5]) == (5, 5, 5)
    assert lengths.quantiles(list(range(1, 101))) == (11, 51, 91)


def test_summary_holds_all_shares():
    about = lengths.summary(SKEWED, lengths.bin_edges(SKEWED))
    assert sum(about["shares"]) == pytest.approx(1)
    assert len(about["edges"]) == len(about["shares"]) + 1
    assert (about["p10"], about["median"], about["p90"]) == (20, 20, 900)
