"""Perplexity: exp(mean next-token negative log-likelihood) over non-overlapping windows.

The protocol is the one most quantization papers use (GPTQ, arXiv 2210.17323): the text is one
token stream, cut in windows of `context_length` tokens, the tail dropped; within each window
every token but the first is predicted. Cross entropy in float32.
"""

import math
from dataclasses import dataclass

import torch

from qtool.base import Emit, Notice, Progress, ignore_events
from qtool.data.corpora import Corpus, bos_warning
from qtool.data.windows import windows_of
from qtool.modeling.load import LoadedModel


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """A perplexity and all that it depends on."""

    perplexity: float
    """Infinite above 1e308, NaN where the model's output isn't a number."""
    dataset: str
    context_length: int
    windows: int
    windows_in_dataset: int
    dtype: str
    device: str
    kv_cache: str = "auto"
    """How keys and values were seen: in the dtype, or as an int8 cache holds them."""

    @property
    def conditions(self) -> str:
        """Return on what text it was measured, and how, as people read it."""
        count = f"all {self.windows} windows"
        if self.windows < self.windows_in_dataset:
            count = f"first {self.windows} of {self.windows_in_dataset} windows"
        where = f"{self.dtype} on {self.device}"
        return f"{self.dataset}, {count} of {self.context_length} tokens, {where}"


def perplexity(
    model: LoadedModel,
    corpus: Corpus,
    *,
    context_length: int = 2048,
    max_windows: int | None = None,
    emit: Emit = ignore_events,
) -> PerplexityResult:
    """Measure the perplexity of a model on a text.

    Of windows of `context_length` tokens, at most what the model's positions allow; all, or the
    first `max_windows`. Warns if it has none, or needs a token that most windows lack.

    Raises:
        DataError: the text is shorter than one window, or the model's context is, or a window
            predicts nothing.
    """
    return measure_windows(
        model, corpus, context_length=context_length, max_windows=max_windows, emit=emit
    )[0]


def measure_windows(
    model: LoadedModel,
    corpus: Corpus,
    *,
    context_length: int = 2048,
    max_windows: int | None = None,
    emit: Emit = ignore_events,
) -> tuple[PerplexityResult, tuple[float, ...]]:
    """Return a perplexity, and the summed negative log-likelihood of each window in nats.

    Arguments and errors as `perplexity`.
    """
    windows, available = windows_of(model, corpus, context_length, max_windows)
    kind = str(getattr(model.model.config, "model_type", ""))
    message = bos_warning(kind, model.tokenizer, windows, corpus.name)
    if message is not None:
        emit(Notice(message))
    total, losses = 0.0, []
    what = f"perplexity of {model.name}"
    emit(Progress(what, 0, len(windows)))
    for index, window in enumerate(windows):
        losses.append(window_loss(model, window))
        total += losses[-1]
        running = _exp(total / ((index + 1) * (context_length - 1)))
        emit(Progress(what, index + 1, len(windows), f"{running:.3f}"))
    if math.isnan(total):
        message = (
            f"{model.name} gives outputs that are not numbers on {corpus.name}, so that it has no "
            "perplexity. Try another dtype; if it stays, the weights are damaged."
        )
        emit(Notice(message))
    result = PerplexityResult(
        perplexity=_exp(total / (len(windows) * (context_length - 1))),
        dataset=corpus.name,
        context_length=context_length,
        windows=len(windows),
        windows_in_dataset=available,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
    )
    return result, tuple(losses)


def _exp(mean_loss: float) -> float:
    try:
        return math.exp(mean_loss)
    except OverflowError:  # above 709 nats
        return math.inf


@torch.inference_mode()
def window_loss(model: LoadedModel, window: torch.Tensor) -> float:
    """Return the summed negative log-likelihood of the tokens 1.. of one window."""
    tokens = window.to(model.device).unsqueeze(0)
    logits = model.model(tokens, use_cache=False).logits[0, :-1]
    total = 0.0
    for part, targets in zip(logits.split(256), tokens[0, 1:].split(256), strict=True):
        # in pieces: float32 logits of a long window and a large vocabulary are gigabytes
        total += float(torch.nn.functional.cross_entropy(part.float(), targets, reduction="sum"))
    return total
