import dataclasses
import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.core.paired import (
    Paired,
    mcnemar_p,
    normal_p,
    paired_means,
    paired_ratios,
    student_t_p,
    verdict,
)

VALUES = st.floats(-100, 100).map(lambda value: round(value, 3))
PAIRS = st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=40)
RIGHT_OR_WRONG = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=60)
LIKELIHOODS = st.floats(-50, 0).map(lambda value: round(value, 3))
TRIPLES = st.lists(st.tuples(LIKELIHOODS, LIKELIHOODS, st.integers(1, 30)), min_size=2, max_size=40)


def split(pairs):
    return [float(o) for o, _ in pairs], [float(q) for _, q in pairs]


def split_items(triples):
    return [(o, float(w)) for o, _, w in triples], [(q, float(w)) for _, q, w in triples]


# Means.


@given(PAIRS)
def test_mean_difference_and_its_error_are_the_textbooks(pairs):
    original, quantized = split(pairs)
    found = paired_means(original, quantized)
    gains = [q - o for o, q in zip(original, quantized, strict=True)]
    assert found.items == len(pairs)
    assert found.original == pytest.approx(statistics.fmean(original))
    assert found.quantized == pytest.approx(statistics.fmean(quantized))
    assert found.difference == pytest.approx(statistics.fmean(gains), abs=1e-12)
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    assert found.standard_error == pytest.approx(error, abs=1e-12)
    assert found.improved == sum(gain > 0 for gain in gains)
    assert found.worsened == sum(gain < 0 for gain in gains)


@given(RIGHT_OR_WRONG)
def test_accuracies_are_compared_by_mcnemar(pairs):
    binomtest = pytest.importorskip("scipy.stats").binomtest
    found = paired_means(*split(pairs))
    unlike = found.improved + found.worsened
    expected = binomtest(found.improved, unlike).pvalue if unlike else 1
    assert found.p_value == pytest.approx(expected, rel=1e-9)


@given(PAIRS.filter(lambda pairs: len({round(q - o, 3) for o, q in pairs}) > 1))
def test_other_means_are_compared_by_the_paired_t_test(pairs):
    stats = pytest.importorskip("scipy.stats")
    original, quantized = split(pairs)
    if {*original, *quantized} <= {0, 1}:
        return
    expected = stats.ttest_rel(quantized, original).pvalue
    assert paired_means(original, quantized).p_value == pytest.approx(expected, rel=1e-6, abs=1e-12)


@given(PAIRS)
def test_exchange_of_the_models_changes_the_sign_only(pairs):
    original, quantized = split(pairs)
    there, back = paired_means(original, quantized), paired_means(quantized, original)
    assert back.difference == -there.difference
    assert (back.p_value, back.standard_error) == (there.p_value, there.standard_error)
    assert (back.improved, back.worsened) == (there.worsened, there.improved)


def test_improved_follows_the_direction_of_the_metric():
    found = paired_means([1.0, 2.0, 3.0], [0.5, 1.5, 3.5], higher_is_better=False)
    assert (found.improved, found.worsened) == (2, 1)


def test_equal_change_of_all_items_is_certain():
    found = paired_means([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    assert (found.standard_error, found.p_value) == (0, 0)


# Ratios.


def plain_perplexity(items) -> float:
    return math.exp(-sum(value for value, _ in items) / sum(weight for _, weight in items))


@given(TRIPLES)
def test_perplexities_are_those_of_all_items(triples):
    original, quantized = split_items(triples)
    found = paired_ratios(original, quantized)
    assert found.original == pytest.approx(plain_perplexity(original))
    assert found.quantized == pytest.approx(plain_perplexity(quantized))
    assert found.difference == found.quantized - found.original
    assert found.improved == sum(q > o for o, q, _ in triples)
    assert found.worsened == sum(q < o for o, q, _ in triples)


@given(TRIPLES)
def test_bits_are_the_logarithm_of_the_perplexity(triples):
    original, quantized = split_items(triples)
    bits = paired_ratios(original, quantized, unit="bits")
    plain = paired_ratios(original, quantized)
    assert bits.original == pytest.approx(math.log2(plain.original), abs=1e-9)
    assert bits.quantized == pytest.approx(math.log2(plain.quantized), abs=1e-9)
    assert bits.p_value == plain.p_value


@given(TRIPLES)
def test_error_of_the_difference_is_the_jackknifes_to_first_order(triples):
    """Take each item's influence as a derivative by its multiplicity, numerically."""
    original, quantized = split_items(triples)
    step, influences = 1e-5, []
    for index in range(len(triples)):
        moved = []
        for sign in (1, -1):
            factor = [1 + sign * step * (at == index) for at in range(len(triples))]
            both = (
                [(v * f, w * f) for (v, w), f in zip(items, factor, strict=True)]
                for items in (original, quantized)
            )
            first, second = map(plain_perplexity, both)
            moved.append(second - first)
        influences.append((moved[0] - moved[1]) / (2 * step))
    variance = sum(each**2 for each in influences) * len(triples) / (len(triples) - 1)
    found = paired_ratios(original, quantized)
    scale = max(found.original, found.quantized)
    assert found.standard_error == pytest.approx(math.sqrt(variance), rel=1e-4, abs=1e-7 * scale)


@pytest.mark.parametrize("lengths", ["equal", "unlike"])
@pytest.mark.parametrize("unit", ["perplexity", "bits"])
def test_error_agrees_with_a_bootstrap(lengths, unit):
    random = np.random.default_rng(1)
    count, draws = 300, 4000
    weights = np.ones(count) if lengths == "equal" else random.integers(5, 200, count).astype(float)
    first = -weights * (2.5 + 0.4 * random.standard_normal(count))
    second = first - weights * (0.1 + 0.1 * random.standard_normal(count))
    items = [
        list(zip(values.tolist(), weights.tolist(), strict=True)) for values in (first, second)
    ]
    found = paired_ratios(items[0], items[1], unit=unit)

    drawn = random.integers(0, count, (draws, count))
    total = weights[drawn].sum(1)
    losses = [-values[drawn].sum(1) / total for values in (first, second)]
    metric = np.exp if unit == "perplexity" else (lambda loss: loss / math.log(2))
    differences = metric(losses[1]) - metric(losses[0])
    assert found.standard_error == pytest.approx(differences.std(), rel=0.1)
    z = (losses[1] - losses[0]).mean() / (losses[1] - losses[0]).std()
    assert found.p_value is not None
    assert math.log(found.p_value) == pytest.approx(math.log(normal_p(z)), rel=0.2)


def test_weights_of_one_give_the_t_statistic_of_log_likelihoods():
    values = [-2.0, -3.5, -1.25, -4.0], [-2.5, -3.25, -2.0, -4.5]
    found = paired_ratios(*([(value, 1.0) for value in each] for each in values))
    plain = paired_means(*values)
    assert plain.standard_error is not None
    assert found.original == pytest.approx(math.exp(-plain.original))
    assert found.p_value == pytest.approx(normal_p(plain.difference / plain.standard_error))


@given(TRIPLES, st.integers(2, 5))
def test_unit_of_the_weights_cancels_in_the_p_value(triples, factor):
    original, quantized = split_items(triples)
    scaled = [[(value, weight * factor) for value, weight in i] for i in (original, quantized)]
    there, here = paired_ratios(original, quantized), paired_ratios(*scaled)
    assert here.p_value == pytest.approx(there.p_value, rel=1e-5, abs=1e-12)


def test_item_without_weight_may_be_there():
    found = paired_ratios([(-1.0, 2.0), (0.0, 0.0)], [(-2.0, 2.0), (0.0, 0.0)])
    assert found.original == pytest.approx(math.exp(0.5))


# Distributions.


@pytest.mark.parametrize(("rose", "fell"), [(0, 0), (0, 5), (3, 3), (7, 2), (12, 30), (1, 100)])
def test_mcnemar_counts_coin_tosses(rose, fell):
    count, least = rose + fell, min(rose, fell)
    tail = sum(Fraction(math.comb(count, k), 2**count) for k in range(least + 1))
    exact = float(min(Fraction(1), 2 * tail))
    assert mcnemar_p(rose, fell) == mcnemar_p(fell, rose) == pytest.approx(exact, rel=1e-12)


def test_mcnemar_takes_as_many_items_as_benchmarks_have():
    assert mcnemar_p(7000, 7000) == 1
    assert mcnemar_p(7100, 6900) == pytest.approx(normal_p(199 / math.sqrt(14000)), rel=0.01)
    assert 0 <= mcnemar_p(0, 14000) < 1e-300


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (10, 2.228), (120, 1.980)]
)
def test_student_agrees_with_the_table(freedom, t):
    assert student_t_p(t, freedom) == student_t_p(-t, freedom) == pytest.approx(0.05, rel=1e-3)


@given(st.floats(-40, 40), st.integers(1, 20000))
def test_student_agrees_with_scipy(t, freedom):
    stats = pytest.importorskip("scipy.stats")
    expected = 2 * stats.t.sf(abs(t), freedom)
    assert student_t_p(t, freedom) == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_infinite_statistic_is_certain():
    assert student_t_p(math.inf, 1) == student_t_p(-math.inf, 8) == normal_p(math.inf) == 0


# Verdicts.


def test_verdict_follows_the_direction_of_the_metric():
    rose = Paired(100, 0.5, 0.6, 0.1, 0.02, 0.001, 12, 2)
    fell = dataclasses.replace(rose, quantized=0.4, difference=-0.1)
    assert verdict(rose, higher_is_better=True) == "better"
    assert verdict(rose, higher_is_better=False) == "worse"
    assert verdict(fell, higher_is_better=True) == "worse"
    assert verdict(fell, higher_is_better=False) == "better"


@pytest.mark.parametrize(("p_value", "shown"), [(0.049, True), (0.05, False), (1.0, False)])
def test_large_p_value_shows_nothing(p_value, shown):
    found = Paired(100, 0.5, 0.6, 0.1, 0.02, p_value, 12, 2)
    assert (verdict(found, higher_is_better=True) == "better") is shown
    assert verdict(found, higher_is_better=True, alpha=1e-9) == "no difference shown"


@given(st.lists(VALUES, min_size=2))
def test_equal_items_are_identical(values):
    found = paired_means(values, values)
    assert (found.difference, found.standard_error, found.p_value) == (0, 0, 1)
    assert verdict(found, higher_is_better=True) == "identical"


@given(st.lists(st.tuples(LIKELIHOODS, st.integers(1, 30)), min_size=2))
def test_equal_likelihoods_are_identical(items):
    found = paired_ratios(items, items)
    assert (found.difference, found.standard_error, found.p_value) == (0, 0, 1)
    assert verdict(found, higher_is_better=False) == "identical"


def test_changes_that_balance_are_not_called_identical():
    found = paired_means([0, 1, 1], [1, 0, 1])
    assert verdict(found, higher_is_better=True) == "no difference shown"


def test_one_item_shows_nothing():
    for found in (paired_means([1], [0]), paired_ratios([(-1.0, 1.0)], [(-2.0, 1.0)])):
        assert (found.standard_error, found.p_value) == (None, None)
        assert verdict(found, higher_is_better=True) == "too few items"
