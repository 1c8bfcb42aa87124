"""Draw calibration samples as a recipe asks for them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qtool.base import Emit, Notice, Progress, Tokenizer, ignore_events
from qtool.data.calibration import CalibrationSet, draw_samples
from qtool.data.corpora import WRITTEN_BY_THE_MODEL, Corpus, bos_warning, check_tokens, open_dataset
from qtool.data.documents import Collection
from qtool.data.lengths import bin_edges, match_lengths, summary, task_lengths
from qtool.data.mixture import Source, draw_mixture
from qtool.data.special_tokens import SpecialTokens, count_special
from qtool.errors import DataError, RecipeError
from qtool.modeling.source import ModelSource
from qtool.recipe.calibration import CalibrationSection
from qtool.steps.self_written import self_written

HELD_OUT = 32
"""Samples that end-to-end tuning is judged by."""
FIXED_LENGTH = 2048
"""What `sequence_length: fixed` means, for models with that many positions."""
MORE_WRITTEN = 1.25
"""Tokens that the model writes, per token of it in the samples: what is cut off is lost."""


def wanted_lengths(
    section: CalibrationSection, tokenizer: Tokenizer, given: Sequence[int] | None
) -> list[int] | None:
    """Return the lengths to match: those given, else the tasks'; None where the recipe fixes one.

    Raises:
        RecipeError: lengths are to be matched, but to nothing.
    """
    if section.sequence_length != "match":
        return None
    if given is not None:
        return list(given)
    if not section.tasks:
        raise RecipeError(
            "calibration.sequence_length is 'match', but calibration.tasks is empty. Name the "
            "tasks, or give a number or 'fixed'."
        )
    return task_lengths(tokenizer, section.tasks)


def draw_calibration(
    section: CalibrationSection,
    source: ModelSource,
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int] | None,
    seed: int,
    emit: Emit = ignore_events,
) -> CalibrationSet:
    """Draw the samples, and note all that decided them.

    Lengths are those of `wanted_lengths`; their order is drawn with the seed. Warns if the text is
    too short for all samples.

    Raises:
        DataError: the text is missing or too short for two samples, or a sample would be longer
            than the model's context.
        MissingExtraError: the library that reads the data set isn't installed.
    """
    drawn = _drawn_lengths(section, source.num_positions or 2**31, lengths, seed)
    sources = open_sources(section, source, num_tokens=sum(drawn), seed=seed, emit=emit)
    if section.mixture:
        calibration = draw_mixture(sources, tokenizer, drawn, seed=seed, holdout=section.holdout)
    else:
        calibration = draw_samples(
            tokenizer, sources[0].texts, drawn, at_starts=lengths is not None
        )
    for message in _shortages(section, calibration):
        emit(Notice(message))
    special = check_samples(source, tokenizer, calibration, emit)
    requested = drawn if lengths is None else lengths
    used = [len(sample) for sample in calibration.samples]
    edges = bin_edges([*requested, *used])
    decided = {
        "seed": seed,
        "sequence_length": section.sequence_length,
        "tasks": [] if lengths is None else list(section.tasks),
        "requested lengths": summary(requested, edges),
        "used lengths": summary(used, edges),
        "special tokens": dict(special.counts),
        "special tokens missing": list(special.missing),
    }
    return replace(calibration, provenance={**calibration.provenance, **decided})


def draw_for_tuning(
    section: CalibrationSection,
    source: ModelSource,
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int],
    seed: int,
    emit: Emit,
) -> tuple[list[Tensor], list[Tensor]]:
    """Draw samples of these lengths from the mixture, and a few of documents that they don't have.

    Returns:
        To learn from, and held out, as long as the last of them: each (length,) int64.

    Raises:
        DataError: a source can't be read, or a token has no embedding.
        MissingExtraError: the library that reads a data set isn't installed.
    """
    wanted = [*lengths, *[lengths[-1]] * HELD_OUT]
    sources = open_sources(section, source, num_tokens=sum(wanted), seed=seed, emit=emit)
    held_out = HELD_OUT / len(wanted)
    drawn = draw_mixture(sources, tokenizer, wanted, seed=seed, holdout=held_out)
    rows = source.weight_shape(source.adapter.embedding)[0]
    check_tokens(torch.cat(drawn.samples), rows, str(drawn.provenance["dataset"]))
    train, rest = drawn.split(held_out)
    return list(train.samples), list(rest.samples)


def _drawn_lengths(
    section: CalibrationSection, limit: int, lengths: Sequence[int] | None, seed: int
) -> list[int]:
    if lengths is not None:
        return match_lengths(lengths, num_tokens=section.num_tokens, longest=limit, seed=seed)
    fixed = section.sequence_length == "fixed"
    length = min(FIXED_LENGTH, limit) if fixed else int(section.sequence_length)
    if length > limit:
        raise DataError(
            f"calibration.sequence_length is {length}, but the model has {limit} positions. "
            f"Give a number of at most {limit}."
        )
    return [length] * section.num_samples


def check_samples(
    source: ModelSource, tokenizer: Tokenizer, calibration: CalibrationSet, emit: Emit
) -> SpecialTokens:
    """Refuse samples that the model can't read, and warn of those that it reads poorly.

    Says which of the model's special tokens are in them, and returns that.

    Raises:
        DataError: a token has no embedding, or a sample is longer than the model's context.
    """
    name = str(calibration.provenance.get("dataset"))
    rows = source.weight_shape(source.adapter.embedding)[0]
    check_tokens(torch.cat(calibration.samples), rows, name)
    longest, limit = max(map(len, calibration.samples)), source.num_positions
    if limit is not None and longest > limit:
        raise DataError(
            f"A sample of {name} has {longest} tokens, but the model has {limit} positions. Run "
            "`qtool calibrate` on this model."
        )
    special = count_special(tokenizer, calibration.samples)
    emit(Progress(special.sentence()))
    kind = str(source.config.get("model_type", ""))
    running = () if calibration.sources else calibration.samples
    for message in (bos_warning(kind, tokenizer, running, name), special.warning(name)):
        if message is not None:
            emit(Notice(message))
    return special


def open_sources(
    section: CalibrationSection,
    source: ModelSource,
    *,
    num_tokens: int,
    seed: int,
    emit: Emit = ignore_events,
) -> list[Source]:
    """Return the texts of a recipe and their shares; of `model` what the model writes now.

    Args:
        section: Names them.
        source: The model.
        num_tokens: How many are wanted of all together.
        seed: Of what the model writes.
        emit: Is told of that.

    Raises:
        DataError: there is no such text, or it can't be read.
        MissingExtraError: the library that reads it isn't installed.
    """
    opened = []
    for part in section.sources:
        if part.dataset == WRITTEN_BY_THE_MODEL:
            wanted = int(MORE_WRITTEN * part.share * num_tokens)
            texts: Corpus | Collection = self_written(
                source, num_tokens=wanted, seed=seed, emit=emit
            )
        else:
            texts = open_dataset(part.dataset)
        opened.append(Source(texts, part.share, part.rendering))
    return opened


def _shortages(section: CalibrationSection, calibration: CalibrationSet) -> Iterator[str]:
    """Yield what there is too little of: texts, or samples for all sources."""
    about = calibration.provenance
    key = "num_tokens" if section.sequence_length == "match" else "num_samples"
    if about["samples"] < about["samples wanted"]:
        yield (
            f"{about['dataset']} is too short: {about['samples']} of {about['samples wanted']} "
            f"samples were drawn, {about['tokens']} tokens in place of {about['tokens wanted']}. "
            f"Use a longer text, or lower calibration.{key}."
        )
    sources = about.get("sources", ())
    few = [one["dataset"] for one in sources if one["samples"] < 2]  # noqa: PLR2004
    if few and len(sources) > 1:
        yield (
            f"{about['samples']} samples are few for a mixture of {len(sources)} sources: none can "
            f"be held out of {', '.join(few)}. Raise calibration.{key}."
        )
    for one in sources:
        if one["rounds"] > 1:
            yield (
                f"{one['dataset']} is too short for {one['tokens']} tokens: its documents were "
                f"used {one['rounds']} times, each time in another order."
            )
