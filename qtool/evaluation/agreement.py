"""How closely a quantized model follows its original, on a text.

The divergence KL(original || quantized) per token says more than the two perplexities do: errors of
both signs add up in it, and it needs fewer tokens for the same certainty. The two models are never
in memory at once, since an original may fill it alone: `record_reference` writes down what the
original says at some positions of the text, `compare_to_reference` asks the quantized model there.
"""

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.base import Emit, Progress, ignore_events
from qtool.data.corpora import Corpus
from qtool.data.documents import Collection
from qtool.data.windows import positions_of, windows_of
from qtool.errors import DataError
from qtool.evaluation.predictions import Reference, Tokens, log_probabilities, token_values
from qtool.modeling.load import LoadedModel
from qtool.modeling.own_words import written_as_asked

START_TOKENS = 32


@dataclass(frozen=True, slots=True)
class GreedyDiff:
    """What two models make of one prompt by greedy search."""

    prompt: str
    original: str
    quantized: str
    equal_tokens: int
    """Before the first difference; what comes after it has another context."""
    tokens: int
    """Of the longer continuation: to stop early is a difference too."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How closely a quantized model follows its original, and all that this depends on.

    The standard errors take positions as independent, which holds while they are spread thin.
    """

    kl_divergence: float
    """Mean of KL(original || quantized), in nats per token."""
    kl_standard_error: float
    kl_p99: float
    """The divergence that one position in a hundred exceeds."""
    top1_agreement: float
    """Share of positions where both models find the same token most probable."""
    top1_standard_error: float
    positions: int
    dataset: str
    context_length: int
    greedy: tuple[GreedyDiff, ...]
    greedy_equal_share: float | None
    """Mean share of the continuations before the first difference; None: there are no prompts."""


def record_reference(  # noqa: PLR0913 - a text and how much of it to look at
    model: LoadedModel,
    corpus: Corpus | Collection,
    *,
    context_length: int = 2048,
    max_windows: int | None = None,
    positions: int = 2048,
    prompts: int = 4,
    new_tokens: int = 64,
    dtype: torch.dtype = torch.float32,
    emit: Emit = ignore_events,
) -> Reference:
    """Write down what the original model says about a text.

    Args:
        model: The original.
        corpus: The text, or chats, cut in windows as for `perplexity`.
        context_length: Tokens per window; at most what the model's positions allow.
        max_windows: Use the first windows only; None: all.
        positions: Evenly spaced positions to record, over all windows; all, if there are fewer.
        prompts: Evenly spaced beginnings of greedy search, of 32 tokens each.
        new_tokens: The most tokens to continue a prompt by.
        dtype: Of what is kept; float16 moves a divergence by about 1e-5.
        emit: Is told of each window with a position.

    Raises:
        DataError: as `perplexity`; or there are fewer than two positions; or a prompt and its
            continuation exceed the model's positions.
        ModelError: the model's output isn't a number.
    """
    windows, _ = windows_of(model, corpus, context_length, max_windows)
    predicted = windows.shape[0] * (context_length - 1)
    chosen = _evenly_spaced(max(0, min(positions, predicted)), predicted)
    if len(chosen) < 2:  # noqa: PLR2004
        raise DataError(
            f"{len(chosen)} of {predicted} predicted positions of {corpus.name} are to be compared;"
            " a standard error needs at least 2. Use more positions, or more or longer windows."
        )
    starts = _prompts(windows.flatten(), prompts)
    _check_lengths(model, max(map(len, starts), default=0), new_tokens)
    table, done = torch.empty(0), 0
    for rows in log_probabilities(model, corpus.name, windows, chosen, emit):
        if done == 0:
            # filled in place: parts to be joined at the end would need twice the memory
            table = torch.empty(len(chosen), rows.shape[1], dtype=dtype)
        table[done : done + len(rows)] = rows
        done += len(rows)
    return Reference(
        name=model.name,
        dataset=corpus.name,
        windows=windows,
        positions=chosen,
        log_probabilities=table,
        prompts=starts,
        continuations=_continue(model, starts, new_tokens, emit),
        new_tokens=new_tokens,
    )


def compare_to_reference(
    model: LoadedModel, reference: Reference, emit: Emit = ignore_events
) -> Agreement:
    """Compare a quantized model, which reads the tokens of the reference, with what that said.

    Raises:
        DataError: the vocabularies have different sizes.
        ModelError: the model's output isn't a number.
    """
    values = token_values(model, reference, emit)
    kl, agrees = values.divergence, values.same
    own = _continue(model, reference.prompts, reference.new_tokens, emit)
    greedy = tuple(
        _greedy_diff(model, *texts)
        for texts in zip(reference.prompts, reference.continuations, own, strict=True)
    )
    shares = [diff.equal_tokens / diff.tokens for diff in greedy]
    return Agreement(
        kl_divergence=float(kl.mean()),
        kl_standard_error=float(kl.std()) / math.sqrt(len(kl)),
        kl_p99=float(kl.quantile(0.99)),
        top1_agreement=float(agrees.mean()),
        top1_standard_error=float(agrees.std()) / math.sqrt(len(agrees)),
        positions=len(kl),
        dataset=reference.dataset,
        context_length=reference.windows.shape[1],
        greedy=greedy,
        greedy_equal_share=math.fsum(shares) / len(shares) if shares else None,
    )


def _evenly_spaced(count: int, available: int) -> Tensor:
    """Return the middles of `count` equal stretches of 0 .. available - 1; all if as many."""
    return (2 * torch.arange(count) + 1) * available // (2 * max(1, count))


def _prompts(stream: Tensor, count: int) -> tuple[Tokens, ...]:
    starts = [index * len(stream) // count for index in range(count)]
    return tuple(tuple(stream[start : start + START_TOKENS].tolist()) for start in starts)


def _check_lengths(model: LoadedModel, prompt_tokens: int, new_tokens: int) -> None:
    limit = positions_of(model.model.config)
    if prompt_tokens and (new_tokens < 1 or prompt_tokens + new_tokens > (limit or math.inf)):
        raise DataError(
            f"A prompt of {prompt_tokens} tokens is to be continued by {new_tokens}, and "
            f"{model.name} has {limit or 'unlimited'} positions. Continue by at least 1 token "
            "within the positions, or use no prompts."
        )


def _continue(
    model: LoadedModel, prompts: Sequence[Tokens], new_tokens: int, emit: Emit
) -> tuple[Tokens, ...]:
    """Return what greedy search appends to each prompt."""
    found: list[Tokens] = []
    for prompt in prompts:
        emit(Progress(f"continuations by {model.name}", len(found), len(prompts)))
        found.append(_continuation(model, prompt, new_tokens))
    return tuple(found)


def _continuation(model: LoadedModel, prompt: Tokens, new_tokens: int) -> Tokens:
    ids = torch.tensor([prompt], device=model.device)
    pad = model.tokenizer.pad_token_id
    with _quiet(), written_as_asked(model):
        out = model.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0 if pad is None else pad,  # a lone prompt is never padded
        )
    return tuple(out[0, len(prompt) :].tolist())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers, which warns about sampling options that greedy search leaves alone."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _greedy_diff(
    model: LoadedModel, prompt: Tokens, original: Tokens, quantized: Tokens
) -> GreedyDiff:
    pairs = list(zip(original, quantized, strict=False))
    equal = next((i for i, (first, second) in enumerate(pairs) if first != second), len(pairs))
    decode, length = model.tokenizer.decode, max(len(original), len(quantized))
    return GreedyDiff(decode(prompt), decode(original), decode(quantized), equal, length)
