"""How far models are from the first on one text: the block that llama-perplexity prints."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from qtool.wording import with_error

if TYPE_CHECKING:
    from qtool.core.spread import Estimate, Spread
    from qtool.pipeline.model_texts import KlBlock, PerplexityChange

OF_DIVERGENCES = ("99.9", "99", "95", "90", "50", "10", "5", "1")
OF_GAINS = ("99.9", "99", "95", "90", "75", "50", "25", "10", "5", "1", "0.1")
"""Percentiles, as llama-perplexity prints them."""
PERPLEXITY_LINES = (
    *("Mean PPL(Q)", "Mean PPL(base)", "Mean PPL(Q)/PPL(base)"),
    *("Mean ln(PPL(Q)/PPL(base))", "Mean PPL(Q)-PPL(base)", "p of no difference"),
)

BlockAndChange = tuple["KlBlock", "PerplexityChange | None"]


def block_rows(models: Mapping[str, BlockAndChange]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return columns, one per model, and rows, one per statistic."""
    columns = ["", *(f">{label}" for label in models)]
    lines = [list(_block(block)) for block, _ in models.values()]
    if any(change is not None for _, change in models.values()):
        changes = [_perplexity(change) for _, change in models.values()]
        lines = [[*first, *rest] for first, rest in zip(changes, lines, strict=True)]
    rows = [(group[0][0], *(text for _, text in group)) for group in zip(*lines, strict=True)]
    return columns, [row for row in rows if any(row[1:])]


def _perplexity(change: "PerplexityChange | None") -> list[tuple[str, str]]:
    if change is None:
        return [(name, "") for name in PERPLEXITY_LINES]
    paired = change.paired
    texts = (
        f"{paired.quantized:.4f}",
        f"{paired.original:.4f}",
        estimate_text(change.ratio),
        estimate_text(change.log_ratio),
        with_error(paired.difference, paired.standard_error),
        "" if paired.p_value is None else f"{paired.p_value:.2g}",
    )
    return list(zip(PERPLEXITY_LINES, texts, strict=True))


def _block(block: "KlBlock") -> Iterator[tuple[str, str]]:
    yield from _spread("KLD", block.divergence, OF_DIVERGENCES)
    yield from _spread("Δp", block.gain, OF_GAINS, percent=True)
    yield "RMS Δp", estimate_text(block.gain_rms, percent=True)
    yield "Same top p", estimate_text(block.same, percent=True)


def _spread(
    what: str, found: "Spread", percents: Sequence[str], *, percent: bool = False
) -> Iterator[tuple[str, str]]:
    yield f"Mean {what}", estimate_text(found.mean, percent=percent)
    yield f"Maximum {what}", with_error(found.maximum, percent=percent)
    for each in percents:
        name = "Median" if each == "50" else f"{each}%"
        yield f"{name} {what}", estimate_text(found.percentiles[each], percent=percent)
    yield f"Minimum {what}", with_error(found.minimum, percent=percent)


def estimate_text(found: "Estimate", *, percent: bool = False) -> str:
    """Return a number with its standard error, if it has one."""
    return with_error(found.value, found.standard_error, percent=percent)
