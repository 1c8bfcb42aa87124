"""Draw calibration samples as a recipe asks for them."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from qtool.base import Emit, Notice, Tokenizer, ignore_events
from qtool.data.calibration import CalibrationSet, draw_samples
from qtool.data.corpora import bos_warning, check_tokens, open_dataset
from qtool.data.lengths import bin_edges, match_lengths, summary, task_lengths
from qtool.errors import DataError, RecipeError
from qtool.modeling.source import ModelSource
from qtool.recipe.schema import CalibrationSection

FIXED_LENGTH = 2048
"""What `sequence_length: fixed` means, for models with that many positions."""


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
    limit = source.num_positions or 2**31
    if lengths is not None:
        drawn = match_lengths(lengths, num_tokens=section.num_tokens, longest=limit, seed=seed)
    else:
        fixed = section.sequence_length == "fixed"
        length = min(FIXED_LENGTH, limit) if fixed else int(section.sequence_length)
        if length > limit:
            raise DataError(
                f"calibration.sequence_length is {length}, but the model has {limit} positions. "
                f"Give a number of at most {limit}."
            )
        drawn = [length] * section.num_samples
    texts = open_dataset(section.dataset)
    calibration = draw_samples(tokenizer, texts, drawn, at_starts=lengths is not None)
    if len(calibration.samples) < len(drawn):
        emit(Notice(_too_short(section, calibration)))
    check_samples(source, tokenizer, calibration, emit)
    requested = drawn if lengths is None else lengths
    used = [len(sample) for sample in calibration.samples]
    edges = bin_edges([*requested, *used])
    decided = {
        "seed": seed,
        "sequence_length": section.sequence_length,
        "tasks": [] if lengths is None else list(section.tasks),
        "requested lengths": summary(requested, edges),
        "used lengths": summary(used, edges),
    }
    return replace(calibration, provenance={**calibration.provenance, **decided})


def check_samples(
    source: ModelSource, tokenizer: Tokenizer, calibration: CalibrationSet, emit: Emit
) -> None:
    """Refuse samples that the model can't read, and warn of those that it reads poorly.

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
    kind = str(source.config.get("model_type", ""))
    message = bos_warning(kind, tokenizer, calibration.samples, name)
    if message is not None:
        emit(Notice(message))


def _too_short(section: CalibrationSection, calibration: CalibrationSet) -> str:
    about = calibration.provenance
    key = "num_tokens" if section.sequence_length == "match" else "num_samples"
    return (
        f"{about['dataset']} is too short: {about['samples']} of {about['samples wanted']} samples "
        f"were drawn, {about['tokens']} tokens in place of {about['tokens wanted']}. Use a longer "
        f"text, or lower calibration.{key}."
    )
