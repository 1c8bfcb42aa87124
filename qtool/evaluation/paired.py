"""Whether a quantized model answers the same items worse: statistics of a paired comparison.

Both models answer the same items, and most answers are equal. So the difference per item varies
far less than the answers do, and two error bars that overlap say nothing; the standard error of the
difference does. A p-value is that of one comparison: of twenty tasks, one is below 0.05 by chance.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from qtool.errors import DataError

Unit = Literal["perplexity", "bits"]
Verdict = Literal["better", "worse", "no difference shown", "identical", "too few items"]
Item = tuple[float, float]
"""Log-likelihood in nats; weight, such as the number of words or bytes."""


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

    The p-value is the exact one of McNemar where all values are 0 or 1, else that of a paired
    t-test.

    Args:
        original: One value per item.
        quantized: Likewise, in the same order.
        higher_is_better: What `improved` and `worsened` count.

    Raises:
        DataError: the items don't match, or there are none, or a value isn't a finite number.
    """
    _check_items(original, quantized, "value", [*original, *quantized])
    count = len(original)
    means = math.fsum(original) / count, math.fsum(quantized) / count
    difference = means[1] - means[0]
    gains = [second - first for first, second in zip(original, quantized, strict=True)]
    rose, fell = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    error = p_value = None
    if count > 1:
        error = math.sqrt(_variance_of_sum(gain - difference for gain in gains) / count**2)
        if {*original, *quantized} <= {0, 1}:
            p_value = mcnemar_p(rose, fell)
        else:
            p_value = student_t_p(_ratio(difference, error), count - 1)
    improved, worsened = (rose, fell) if higher_is_better else (fell, rose)
    return Paired(count, *means, difference, error, p_value, improved, worsened)


def paired_ratios(
    original: Sequence[Item], quantized: Sequence[Item], *, unit: Unit = "perplexity"
) -> Paired:
    """Compare two perplexities, or bits per byte, over the same items.

    With L = -sum(log-likelihood) / sum(weight), the metric is exp(L), or L / ln 2 in bits. An item
    moves L by its residual r = -(log-likelihood + L * weight) / sum(weight), to first order (the
    delta method), hence exp(L) by exp(L) * r. Standard errors are those of the sums of the paired
    differences of these, one per item: words inside an item may depend on each other. The p-value
    is that of z = (L_quantized - L_original) / its standard error, the log ratio of perplexities.

    Args:
        original: One (log-likelihood, weight) per item; a weight of 1 if the metric is the mean.
        quantized: Likewise, in the same order and with the same weights.
        unit: Of the metric.

    Raises:
        DataError: the items or their weights don't match, or there are none, or a value isn't a
            finite number, or a weight is negative, or all are 0, or a perplexity is no float.
    """
    numbers = [number for item in (*original, *quantized) for number in item]
    _check_items(original, quantized, "log-likelihood or weight", numbers)
    weights = [weight for _, weight in original]
    _check_weights(weights, [weight for _, weight in quantized])
    count, total = len(original), math.fsum(weights)
    losses = tuple(
        -math.fsum(value for value, _ in items) / total for items in (original, quantized)
    )
    metrics = tuple(_metric(loss, unit) for loss in losses)
    slopes = metrics if unit == "perplexity" else (1 / math.log(2), 1 / math.log(2))
    first, second = (
        [-(value + loss * weight) / total for value, weight in items]
        for items, loss in zip((original, quantized), losses, strict=True)
    )
    error = p_value = None
    if count > 1:
        pairs = list(zip(first, second, strict=True))
        error = math.sqrt(_variance_of_sum(slopes[1] * q - slopes[0] * o for o, q in pairs))
        log_error = math.sqrt(_variance_of_sum(q - o for o, q in pairs))
        p_value = normal_p(_ratio(losses[1] - losses[0], log_error))
    gains = [q[0] - o[0] for o, q in zip(original, quantized, strict=True)]
    return Paired(
        items=count,
        original=metrics[0],
        quantized=metrics[1],
        difference=metrics[1] - metrics[0],
        standard_error=error,
        p_value=p_value,
        improved=sum(gain > 0 for gain in gains),
        worsened=sum(gain < 0 for gain in gains),
    )


def verdict(paired: Paired, *, higher_is_better: bool, alpha: float = 0.05) -> Verdict:
    """Say in words what a comparison shows; a large p-value doesn't show that models are equal.

    Args:
        paired: The comparison.
        higher_is_better: False for a perplexity.
        alpha: A difference is shown if the p-value is below this.
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
    count = rose + fell
    term = tail = 1
    for k in range(min(rose, fell)):
        term = term * (count - k) // (k + 1)  # count choose k + 1: whole, so exact
        tail += term
    return min(1.0, 2 * tail / 2**count)  # integers of any size divide to the nearest float


def student_t_p(t: float, freedom: int) -> float:
    """Return the two-sided p-value of Student's t; below 1e-13 it is noise of rounding.

    The finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4, for a whole number of degrees of
    freedom: scipy is there only with the extra `eval`.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    terms = []
    for k in range(1 + odd, freedom, 2):  # cosines to the power freedom - 2
        terms.append(term)
        term *= cosine**2 * k / (k + 1)
    inside = sine * math.fsum(terms)
    if odd:
        inside = 2 / math.pi * (angle + inside)
    return min(1.0, max(0.0, 1 - inside))


def normal_p(z: float) -> float:
    """Return the two-sided p-value of a standard normal variable."""
    return math.erfc(abs(z) / math.sqrt(2))


def _ratio(difference: float, error: float) -> float:
    """Return a test statistic: infinite where all items differ by the same amount."""
    if error == 0:
        return 0.0 if difference == 0 else math.copysign(math.inf, difference)
    return difference / error


def _variance_of_sum(residuals: Iterable[float]) -> float:
    """Estimate the variance of a sum of items from what they add to it, less the mean of that."""
    squares = [residual**2 for residual in residuals]
    return math.fsum(squares) * len(squares) / (len(squares) - 1)


def _metric(loss: float, unit: Unit) -> float:
    if unit == "bits":
        return loss / math.log(2)
    try:
        return math.exp(loss)
    except OverflowError:
        raise DataError(
            f"The mean loss is {loss:.4g} nats, whose perplexity no float can hold. Compare bits "
            "instead, or look at what the model answers: it may be broken."
        ) from None


def _check_items(
    original: Sequence[object], quantized: Sequence[object], what: str, numbers: Iterable[float]
) -> None:
    if len(original) != len(quantized) or not original:
        raise DataError(
            f"The original has {len(original)} items and the quantized model {len(quantized)}; a "
            "paired comparison needs the same items of both, at least 1. Evaluate both on the same "
            "task with the same limit."
        )
    for number in numbers:
        if not math.isfinite(number):
            raise DataError(
                f"A {what} of an item is {number}, and only finite numbers can be compared. Look "
                "at what the model answers: its output may overflow."
            )


def _check_weights(original: Sequence[float], quantized: Sequence[float]) -> None:
    for index, (first, second) in enumerate(zip(original, quantized, strict=True)):
        if first != second or first < 0:
            raise DataError(
                f"Item {index} weighs {first} for the original and {second} for the quantized "
                "model; a weight must be equal for both and not negative. Are the items in the "
                "same order?"
            )
    if not any(original):
        raise DataError("All items weigh 0, so nothing can be compared. Give other items.")
