"""What models say at some positions of a text, and how far two of them are apart there."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.base import Emit, Progress, ignore_events
from qtool.core.divergence import kl_divergences
from qtool.errors import DataError, ModelError
from qtool.modeling.load import LoadedModel

Tokens = tuple[int, ...]
CHUNK_VALUES = 2**22
"""Probabilities handled at a time, on the model's device: six float64 copies of 32 MiB or so."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What an original says about a text; in float32 it needs 4 bytes * positions * vocabulary.

    That is 0.4 GiB for 2048 positions and a vocabulary of 49k, 1 GiB for 128k, 2 GiB for 256k.
    """

    name: str
    dataset: str
    windows: Tensor
    """(windows, context_length) int64: the tokens that both models read."""
    positions: Tensor
    """(positions,) int64, ascending: window * (context_length - 1) + place in the window."""
    log_probabilities: Tensor
    """(positions, vocabulary) on the CPU: of the token after each position."""
    prompts: tuple[Tokens, ...]
    continuations: tuple[Tokens, ...]
    """One per prompt: the tokens of greedy search."""
    new_tokens: int
    """The most tokens that a continuation may have."""


@dataclass(frozen=True, slots=True)
class TokenValues:
    """How far a model is from its original at each of some positions, each (positions,) float64."""

    divergence: Tensor
    """KL(original || model), in nats."""
    same: Tensor
    """1 where both find the same token most probable, else 0."""
    gain: Tensor
    """Probability of the token that follows in the text: the model's less the original's."""


def token_values(
    model: LoadedModel, reference: Reference, emit: Emit = ignore_events, batch: int = 1
) -> TokenValues:
    """Return how far a model is, at each position, from what an original said; by `batch` windows.

    Raises:
        DataError: the vocabularies have different sizes.
        ModelError: the model's output isn't a number.
    """
    _check_vocabulary(model, reference)
    windows, positions = reference.windows, reference.positions
    following = windows[:, 1:].flatten()[positions]
    found, done = [], 0
    for rows in log_probabilities(model, reference.dataset, windows, positions, emit, batch):
        original = reference.log_probabilities[done : done + len(rows)].to(rows.device)
        token = following[done : done + len(rows)].to(rows.device).unsqueeze(1)
        gain = rows.gather(1, token).double().exp() - original.gather(1, token).double().exp()
        same = (original.argmax(1) == rows.argmax(1)).double()
        values = torch.stack([kl_divergences(original, rows), same, gain.squeeze(1)])
        found.append(values.cpu())
        done += len(rows)
    return TokenValues(*torch.cat(found, 1))


def _check_vocabulary(model: LoadedModel, reference: Reference) -> None:
    # before the first window: a token that a model on a card doesn't know ends the process
    size = model.model.config.get_text_config().vocab_size
    expected = reference.log_probabilities.shape[1]
    if size != expected:
        raise DataError(
            f"{model.name} has a vocabulary of {size} tokens and {reference.name} one of "
            f"{expected}; only vocabularies of one size, padding included, can be compared. "
            "Compare a quantized model with the model that it was made from."
        )


@torch.inference_mode()
def log_probabilities(
    model: LoadedModel, text: str, windows: Tensor, positions: Tensor, emit: Emit, batch: int = 1
) -> Iterator[Tensor]:
    """Yield log-probabilities at the positions in their order, (rows, vocabulary) float32.

    `text` is what the windows are of. The model reads exactly `batch` windows at a time; the last
    batch is filled up with its first.
    """
    places = windows.shape[1] - 1
    used, counts = (positions // places).unique_consecutive(return_counts=True)
    offsets = (positions % places).split(counts.tolist())
    what = f"predictions of {model.name} on {text}"
    emit(Progress(what, 0, len(used)))
    for start in range(0, len(used), batch):
        read = used[start : start + batch]
        filled = torch.cat([read, read[:1].expand(batch - len(read))])
        output = model.model(windows[filled].to(model.device), use_cache=False).logits
        for row, window in enumerate(read.tolist()):
            logits = output[row, offsets[start + row].to(model.device)]
            for part in logits.split(max(1, CHUNK_VALUES // logits.shape[1])):
                rows = part.float().log_softmax(1)
                if bool(rows.isnan().any()):
                    raise ModelError(
                        f"{model.name} gives outputs that are not numbers, in window {window}. Try "
                        "another dtype; if it stays, the weights are damaged."
                    )
                yield rows
            emit(Progress(what, start + row + 1, len(used)))
