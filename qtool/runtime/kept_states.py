"""A model's own forward, call after call: with what it keeps, or all tokens where that is nothing.

Models call what they keep differently: keys and values, or the states of a recurrence. Some keep
nothing, such as GPT-1 and BERT's family unless it was made a decoder, and must read all again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

STATE_NAMES = ("past_key_values", "cache_params", "state")
"""Of what a model returns, and takes again."""


@dataclass(frozen=True, slots=True)
class ReadSoFar:
    """What a sequence has left."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of the next call."""
    seen: Tensor | None = None
    """All tokens, (1, length) int64, where nothing was kept."""


NOTHING_READ = ReadSoFar()


def go_on(
    model: Any,  # noqa: ANN401
    ids: Tensor,
    kept: ReadSoFar,
    options: Mapping[str, Any],
) -> tuple[Any, ReadSoFar]:
    """Return what a model says after some more tokens of a sequence.

    Args:
        model: Of transformers.
        ids: (1, length) int64.
        kept: What the call before has left; `NOTHING_READ` at the beginning.
        options: Further arguments.

    Returns:
        The model's output, and what the next call takes.
    """
    whole = ids if kept.seen is None else torch.cat([kept.seen, ids], dim=1)
    output = model(whole, use_cache=True, **kept.arguments, **options)
    found = {name: getattr(output, name, None) for name in STATE_NAMES}
    found = {name: one for name, one in found.items() if one is not None}
    return output, ReadSoFar(found, None if found else whole)
