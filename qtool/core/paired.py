"""Whether a quantized model answers the same items worse: statistics of a paired comparison.

Both models answer the same items, and most answers are equal. So the difference per item varies
far less than the answers do, and two error bars that overlap say nothing; the standard error of the
difference does. A p-value is that of one comparison: of twenty tasks, one is below 0.05 by chance.

That items match, and are finite, `scores` has found: others are none of its kinds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Unit = Literal["perplexity", "bits"]
Verdict = Literal["better", "worse", "no difference shown", "identical", "too few items"]
Weighted = tuple[float, float]
"""Log-likelihood in nats; weight, such as the number of words or bytes."""
Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Paired:
    """One metric of two models on the same items."""

    items: int
    original: float
    quantized: float
    difference: float
    """The quantized model's metric less the original's."""
    standard_error: float | None
    """Of the difference; None: fewer than two items."""
    p_value: float | None
    """Two-sided, of no difference; None: fewer than two items."""
    improved: int
    """Items that the quantized model does better at."""
    worsened: int


def paired_means(
    original: Sequence[float], quantized: Sequence[float], *, higher_is_better: bool = True
) -> Paired:
    """Compare two means over the same items, such as accuracies.

    Both have one value per item, in the same order. The p-value is the exact one of McNemar where
    all values are 0 or 1, else that of a paired t-test.
    """
    first, second = np.array(original, dtype=np.float64), np.array(quantized, dtype=np.float64)
    count = len(first)
    means = math.fsum(first) / count, math.fsum(second) / count
    gains, difference = second - first, means[1] - means[0]
    rose, fell = int((gains > 0).sum()), int((gains < 0).sum())
    error = p_value = None
    if count > 1:
        error = error_of_sum(gains - difference) / count
        if {*original, *quantized} <= {0, 1}:
            p_value = mcnemar_p(rose, fell)
        else:
            p_value = student_t_p(_ratio(difference, error), count - 1)
    improved, worsened = (rose, fell) if higher_is_better else (fell, rose)
    return Paired(count, *means, difference, error, p_value, improved, worsened)


def paired_ratios(
    original: Sequence[Weighted], quantized: Sequence[Weighted], *, unit: Unit = "perplexity"
) -> Paired:
    """Compare two perplexities, or bits per byte, over the same items.

    With L = -sum(log-likelihood) / sum(weight), the metric is exp(L), or L / ln 2 in bits. An item
    moves L by its residual r = -(log-likelihood + L * weight) / sum(weight), to first order (the
    delta method), hence exp(L) by exp(L) * r. Standard errors are those of the sums of the paired
    differences of these, one per item: words inside an item may depend on each other. The p-value
    is that of z = (L_quantized - L_original) / its standard error, the log ratio of perplexities.

    Both have one (log-likelihood in nats, weight) per item, in the same order and with the same
    weights, which are 1 if the metric is the mean.
    """
    pairs = np.array(original, dtype=np.float64), np.array(quantized, dtype=np.float64)
    weights = pairs[0][:, 1]
    count, total = len(weights), math.fsum(weights)
    losses = [-math.fsum(items[:, 0]) / total for items in pairs]
    metrics = [math.exp(x) if unit == "perplexity" else x / math.log(2) for x in losses]
    slopes = metrics if unit == "perplexity" else [1 / math.log(2)] * 2
    first, second = (
        -(items[:, 0] + loss * weights) / total for items, loss in zip(pairs, losses, strict=True)
    )
    gains = pairs[1][:, 0] - pairs[0][:, 0]
    rose, fell = int((gains > 0).sum()), int((gains < 0).sum())
    error = p_value = None
    if count > 1:
        error = error_of_sum(slopes[1] * second - slopes[0] * first)
        p_value = normal_p(_ratio(losses[1] - losses[0], error_of_sum(second - first)))
    before, after = metrics
    return Paired(count, before, after, after - before, error, p_value, rose, fell)


def verdict(paired: Paired, *, higher_is_better: bool, alpha: float = 0.05) -> Verdict:
    """Say in words what a comparison shows: a difference, if the p-value is below `alpha`.

    A large p-value doesn't show that models are equal.
    """
    if paired.p_value is None:
        return "too few items"
    if paired.improved == paired.worsened == 0:
        return "identical"
    if paired.p_value >= alpha:
        return "no difference shown"
    return "better" if (paired.difference > 0) == higher_is_better else "worse"


def mcnemar_p(rose: int, fell: int) -> float:
    """Return the two-sided p-value of McNemar's exact test, from the counts of unlike pairs.

    If neither model is better, each of the n pairs rose or fell by a fair coin:
    p = 2 P(Binomial(n, 1/2) <= min(rose, fell)), at most 1.
    """
    from scipy.special import bdtr  # comes with the eval extra, as lm-eval, whose items these are

    return min(1.0, 2 * float(bdtr(min(rose, fell), rose + fell, 0.5)))


def student_t_p(t: float, freedom: int) -> float:
    """Return the two-sided p-value of Student's t."""
    from scipy.special import stdtr

    return 2 * float(stdtr(freedom, -abs(t)))


def normal_p(z: float) -> float:
    """Return the two-sided p-value of a standard normal variable."""
    return math.erfc(abs(z) / math.sqrt(2))


def error_of_sum(residuals: Values) -> float:
    """Return the standard error of a sum, from what each item adds to it less the mean of that."""
    count = len(residuals)
    return math.sqrt(math.fsum(residuals**2) * count / (count - 1))


def _ratio(difference: float, error: float) -> float:
    """Return a test statistic: infinite where all items differ by the same amount."""
    if error == 0:
        return 0.0 if difference == 0 else math.copysign(math.inf, difference)
    return difference / error
