"""The last step of `quantize`: what was written, beside the original, on a little text."""

from pathlib import Path

import torch

from qtool.base import Emit, Notice, Progress
from qtool.data.corpora import Corpus, load_corpus
from qtool.errors import BackendError, QtoolError
from qtool.evaluation.closeness import (
    CHATS,
    PLAIN,
    Closeness,
    References,
    compare_closely,
    record_references,
)
from qtool.modeling.device import default_device, default_dtype, free_memory, room
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.modeling.source import ModelSource
from qtool.pipeline.card import note_closeness
from qtool.recipe.measuring import CheckSection
from qtool.steps.memory import failures_of_the_machine, give_back_memory
from qtool.wording import gigabytes

WINDOWS, WINDOWS_ON_CARD = (2, 512), (8, 1024)
"""Of the text and of the chats, and their tokens: seconds for a small model on a CPU."""
CHARACTERS = 8
"""Of the text, per token that is read of it: more than tokenizers make of English."""
MORE_THAN_WEIGHTS = 1.25
"""Memory that a model takes to run a window, by the bytes of its weights."""
FAR = 1.0
"""Nats per token, from where on a model says something else than its original."""
CHATS_ARE_WORSE = 3.0
"""How many times the divergence on a text that on chats may be; it is smaller, as a rule."""
LEAST = 0.02
"""Nats per token that are worth a warning."""
AS_USUAL = CheckSection()
"""Where the recipe has no section `check`."""


def check_result(
    source: ModelSource, out_dir: Path, emit: Emit, section: CheckSection = AS_USUAL
) -> Closeness | None:
    """Measure how closely a checkpoint follows its original, and warn if it doesn't.

    The two are loaded whole, one after the other, on the device that models run on. The checkpoint
    is finished: whatever fails here is a warning. None: nothing could be measured.
    """
    device = default_device()
    free_memory()
    try:
        with failures_of_the_machine(str(device), out_dir):
            found = _measure(source, out_dir, device, emit, section)
    except QtoolError as error:
        emit(Notice(f"{out_dir} is complete, but wasn't compared with the original: {error}"))
        return None
    finally:
        free_memory()
    for message in warnings_of(found):
        emit(Notice(message))
    note_closeness(out_dir, found, emit)
    return found


def _check_room(source: ModelSource, device: torch.device) -> None:
    """Refuse an original that was quantized layer by layer because it doesn't fit."""
    wider = default_dtype(device).itemsize / torch.float16.itemsize
    needed = int(source.shards.num_bytes() * wider * MORE_THAN_WEIGHTS)
    if needed > room(device):
        raise BackendError(
            f"the original takes {gigabytes(needed)} to run, more than {device} has free. Run "
            "`qtool eval` with --baseline on a larger machine."
        )


def _measure(
    source: ModelSource, out_dir: Path, device: torch.device, emit: Emit, section: CheckSection
) -> Closeness:
    give_back_memory()
    emit(Progress("checking the result"))
    references = record_original(source, device, emit, section)
    return compare_closely(load_model(Location(out_dir)), references, emit)


def record_original(
    source: ModelSource,
    device: torch.device,
    emit: Emit,
    section: CheckSection = AS_USUAL,
) -> References:
    """Write down what an original says of a little text and of chats, and let go of it.

    Raises:
        BackendError: it doesn't fit.
        QtoolError: see `record_references`.
    """
    _check_room(source, device)
    windows, length = _windows(source, device, section)
    original = load_model(Location(source.directory, source.public_name))
    references = record_references(
        original,
        checked_text(source, device, section),
        CHATS,
        emit,
        context_length=length,
        max_windows=windows,
        dtype=torch.float16,
    )
    del original
    free_memory()
    return references


def checked_text(
    source: ModelSource, device: torch.device, section: CheckSection = AS_USUAL
) -> Corpus:
    """Return the text that a result is compared on."""
    windows, length = _windows(source, device, section)
    return Corpus(PLAIN, load_corpus(PLAIN).text[: CHARACTERS * windows * length])


def _windows(source: ModelSource, device: torch.device, section: CheckSection) -> tuple[int, int]:
    """Return how many windows are read, and their tokens."""
    windows, length = WINDOWS_ON_CARD if device.type == "cuda" else WINDOWS
    windows, length = section.windows or windows, section.context_length or length
    return windows, min(length, source.num_positions or length)


def warnings_of(found: Closeness) -> list[str]:
    """Return what a user should know of a result before using it."""
    if found.text is None:
        return []
    text, messages = found.text.kl_divergence, []
    chats = found.chats.kl_divergence if found.chats is not None else None
    worst = max(text, chats or 0.0)
    if worst > FAR:
        messages.append(
            f"The result is far from the original: a KL divergence of {worst:.2f} nats per token. "
            "Use more bits, smaller groups, or more and other calibration data."
        )
    if chats is not None and chats > max(CHATS_ARE_WORSE * text, LEAST):
        messages.append(
            f"The result is much worse on chats than on plain text: a KL divergence of {chats:.3f} "
            f"nats per token in place of {text:.3f}. Calibrate on chats as well, as "
            "the default mixture does (docs/recipes.md)."
        )
    return messages
