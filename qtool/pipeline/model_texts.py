"""What is measured of models on texts, each against the first: perplexity and divergences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from qtool.base import Emit
from qtool.core.paired import Paired, paired_ratios
from qtool.core.spread import Estimate, Spread, estimated_mean, root_mean_square, spread_of
from qtool.data.calibration import tokenizer_digest
from qtool.data.corpora import Corpus
from qtool.errors import QtoolError
from qtool.evaluation.closeness import References
from qtool.evaluation.perplexity import PerplexityResult, measure_windows
from qtool.evaluation.predictions import Reference, TokenValues, token_values
from qtool.modeling.load import LoadedModel
from qtool.pipeline.evaluate import EvalOptions

NOISE_BATCH = 2
"""Windows that the first model reads at a time when it is compared with itself; else it is one."""
FEW_WINDOWS = 30
"""Of fewer the p-value, which is that of a normal variable, would say too much."""


@dataclass(frozen=True, slots=True)
class KlBlock:
    """How far a model is from the first on one text; errors take positions as independent."""

    dataset: str
    positions: int
    context_length: int
    batch: int
    """Windows read at a time."""
    divergence: Spread
    """Of KL(first || model), nats per token."""
    gain: Spread
    """Of the probability of the token that follows in the text: the model's less the first's."""
    gain_rms: Estimate
    """Root of the mean square of that."""
    same: Estimate
    """Share of positions where both find the same token most probable."""


@dataclass(frozen=True, slots=True)
class PerplexityChange:
    """The perplexity of a model beside that of the first, over the same windows."""

    paired: Paired
    """Without a p-value for fewer than `FEW_WINDOWS`."""
    log_ratio: Estimate
    """Mean of ln p of the first less that of the model: nats per token."""
    ratio: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFigures:
    """What was measured of one model on texts."""

    perplexity: PerplexityResult
    change: PerplexityChange | None = None
    """Against the first; None: it is the first, or reads other tokens."""
    text: KlBlock | None = None
    """On the running text; None: it is the first, or see `why_not`."""
    chats: KlBlock | None = None
    why_not: tuple[str, ...] = ()
    """Why something wasn't compared, as sentences."""


@dataclass(slots=True)
class TextMeasure:
    """Measures models one by one; the first is what the others are compared with."""

    corpus: Corpus
    options: EvalOptions
    emit: Emit
    noise: TextFigures | None = None
    """The first against itself, `NOISE_BATCH` windows at a time."""
    references: References | None = field(default=None, init=False)
    losses: tuple[float, ...] = field(default=(), init=False)
    vocabulary: str = field(default="", init=False)

    def measure(self, model: LoadedModel) -> TextFigures:
        """Return the figures of a loaded model.

        Raises:
            DataError: as `perplexity`.
            ModelError: outputs of the first aren't numbers.
        """
        result, losses = measure_windows(
            model,
            self.corpus,
            context_length=self.options.context_length,
            max_windows=self.options.max_windows,
            emit=self.emit,
        )
        if self.references is None:
            self.losses, self.vocabulary = losses, tokenizer_digest(model.tokenizer)
            self.references = self.options.record(model, self.corpus, self.emit)
            self.noise = self._compared(model, result, NOISE_BATCH)
            no_chats = self.references.no_chats
            return TextFigures(perplexity=result, why_not=(no_chats,) if no_chats else ())
        figures = self._compared(model, result, 1)
        if tokenizer_digest(model.tokenizer) != self.vocabulary:
            why = f"{model.name} reads other tokens than the first: perplexities aren't compared."
            return replace(figures, why_not=(*figures.why_not, why))
        change = perplexity_change(self.losses, losses, result.context_length - 1)
        return replace(figures, change=change)

    def _compared(self, model: LoadedModel, result: PerplexityResult, batch: int) -> TextFigures:
        assert self.references is not None
        found: list[KlBlock | None] = []
        why_not = []
        for reference in (self.references.text, self.references.chats):
            try:
                found.append(None if reference is None else self._block(model, reference, batch))
            except QtoolError as error:
                found.append(None)
                why_not.append(str(error))
        text, chats = found
        why = tuple(dict.fromkeys(why_not))
        return TextFigures(perplexity=result, text=text, chats=chats, why_not=why)

    def _block(self, model: LoadedModel, reference: Reference, batch: int) -> KlBlock:
        return kl_block(token_values(model, reference, self.emit, batch), reference, batch)


def kl_block(values: TokenValues, reference: Reference, batch: int) -> KlBlock:
    """Return what `llama-perplexity --kl-divergence` prints, of values at positions of a text."""
    return KlBlock(
        dataset=reference.dataset,
        positions=len(values.divergence),
        context_length=reference.windows.shape[1],
        batch=batch,
        divergence=spread_of(values.divergence),
        gain=spread_of(values.gain),
        gain_rms=root_mean_square(values.gain),
        same=estimated_mean(values.same),
    )


def perplexity_change(
    first: Sequence[float], model: Sequence[float], tokens: int
) -> PerplexityChange | None:
    """Compare perplexities by the losses of the same windows, nats per window of so many tokens.

    None: one isn't finite.
    """
    if not all(map(math.isfinite, (*first, *model))):
        return None
    pairs = [[(-loss, float(tokens)) for loss in losses] for losses in (first, model)]
    try:
        paired = paired_ratios(*pairs)
    except OverflowError:  # above 709 nats
        return None
    if paired.items < FEW_WINDOWS:
        paired = replace(paired, p_value=None)
    bits = paired_ratios(*pairs, unit="bits")
    nats = bits.difference * math.log(2)
    error = None if bits.standard_error is None else bits.standard_error * math.log(2)
    ratio = math.exp(nats)
    of_ratio = None if error is None else ratio * error
    return PerplexityChange(paired, Estimate(nats, error), Estimate(ratio, of_ratio))
