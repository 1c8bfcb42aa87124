"""Draw calibration samples as a recipe asks for them, and measure what the layers see of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qtool.base import Env
from qtool.data.calibration import CalibrationSet, batches, draw_samples
from qtool.data.corpora import load_corpus
from qtool.data.lengths import match_lengths, task_lengths
from qtool.errors import DataError, RecipeError
from qtool.modeling.blocks import BlockModel
from qtool.modeling.source import ModelSource
from qtool.recipe.schema import CalibrationSection

ABSMAX_NAME = "input_absmax.safetensors"
BATCH_TOKENS = 2048


def wanted_lengths(
    section: CalibrationSection,
    tokenizer: Any,  # noqa: ANN401
    given: Sequence[int] | None,
) -> list[int] | None:
    """Return the lengths to match, None where the recipe fixes the length.

    Args:
        section: What the recipe says.
        tokenizer: Of the model.
        given: Lengths from a file, instead of the tasks'.

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
            "tasks, or give a number."
        )
    return task_lengths(tokenizer, section.tasks)


def calibrate(
    section: CalibrationSection,
    source: ModelSource,
    tokenizer: Any,  # noqa: ANN401
    *,
    lengths: Sequence[int] | None,
    seed: int,
) -> CalibrationSet:
    """Draw the samples.

    Args:
        section: What the recipe says.
        source: The model; its positions bound the length of a sample.
        tokenizer: Of the model.
        lengths: Lengths to match, from `wanted_lengths`; None: fixed.
        seed: Of the order of matched lengths.

    Raises:
        DataError: the text is too short, or a sample would be longer than the model's context.
    """
    limit = int(source.config.get("max_position_embeddings") or 2**31)
    if lengths is not None:
        drawn = match_lengths(lengths, num_tokens=section.num_tokens, longest=limit, seed=seed)
    else:
        length = int(section.sequence_length)
        if length > limit:
            raise DataError(
                f"calibration.sequence_length is {length}, but the model has {limit} positions."
            )
        drawn = [length] * section.num_samples
    return draw_samples(tokenizer, load_corpus(section.dataset), drawn)


@torch.no_grad()
def measure_absmax(source: ModelSource, calibration: CalibrationSet, env: Env) -> dict[str, Tensor]:
    """Return the largest magnitude of each input channel of each linear, (in_features,) float32.

    Linears that share an input share the tensor's values; each has its own entry.
    """
    model = BlockModel(source, env.device)
    hidden = model.capture(batches(calibration.samples, BATCH_TOKENS))
    found: dict[str, Tensor] = {}
    for index in range(source.num_blocks):
        block = model.load(index)
        for group in source.adapter.linears:
            inputs = (block.inputs_of(group[0], x).abs().amax(0).float() for x in hidden)
            largest = torch.stack(list(inputs)).amax(0).cpu()
            for name in group:
                found[f"{source.adapter.blocks}.{index}.{name}"] = largest.clone()
        hidden = [block.run(x).cpu() for x in hidden]
        values = {"index": index, "total": source.num_blocks, "name": f"block {index}"}
        env.emit("block", values)
    return found


def save_absmax(absmax: dict[str, Tensor], directory: Path) -> None:
    """Write the input maxima beside the samples."""
    save_file(absmax, directory / ABSMAX_NAME)
