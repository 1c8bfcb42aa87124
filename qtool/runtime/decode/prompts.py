"""Prompts, or parts of them, that are read at once: packed one after the other, of any lengths."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from qtool.runtime.decode.cache import dequantized_rows

if TYPE_CHECKING:
    from qtool.runtime.decode.ops import DecodeState

FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_HEAD_DIMS = range(8, 257, 8)
CPU_TOKENS = 64
"""That attend together."""
OLDEST_FOR_FLASH = (8, 0)
"""Compute capability."""


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """Tokens of one sequence that follow one another."""

    slot: int
    begin: int
    """How many tokens of the sequence the cache has: they are attended to as well."""
    count: int

    @property
    def end(self) -> int:
        """Return how many the cache has afterwards."""
        return self.begin + self.count


@dataclass(frozen=True, slots=True)
class PackedPrompts:
    """Spans, and what a device must know of them."""

    spans: tuple[PromptSpan, ...]
    positions: Tensor  # (tokens,) int32: of each token within its sequence
    slots: Tensor  # (tokens,) int32: of each token
    starts: Tensor  # (spans + 1,) int32: where spans begin among the tokens, and their end
    ends: Tensor  # (spans,) int32: positions after each
    rows: Tensor  # (spans + 1,) int32: where sequences begin in the cache as `_by_flash` sees it
    last: Tensor  # (spans,) int32: which token ends each
    slots_of_spans: Tensor  # (spans,) int32


def packed(spans: Sequence[PromptSpan], keys: Tensor) -> PackedPrompts:
    """Describe spans to a device, by one copy.

    Args:
        spans: Each has a token at least, and a slot of its own.
        keys: (layers, slots, key-value heads, max_length, head_dim), the cache on that device.
    """
    counts = [span.count for span in spans]
    slots = torch.tensor([span.slot for span in spans], dtype=torch.int32)
    starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    per_slot = keys.shape[2] * keys.shape[3]
    parts = [
        torch.cat([torch.arange(span.begin, span.end, dtype=torch.int32) for span in spans]),
        slots.repeat_interleave(torch.tensor(counts)),
        starts,
        torch.tensor([span.end for span in spans], dtype=torch.int32),
        torch.cat([slots, slots.new_tensor([keys.shape[1]])]) * per_slot,
        starts[1:] - 1,
        slots,
    ]
    moved = torch.cat(parts).to(keys.device, non_blocking=True)
    return PackedPrompts(tuple(spans), *moved.split(list(map(len, parts))))


def cache_of_prompts(
    state: "DecodeState", layer: int, prompts: PackedPrompts, dtype: torch.dtype
) -> tuple[Tensor, Tensor, PackedPrompts]:
    """Return keys and values of a layer as numbers, and where they have the sequences.

    An int8 cache isn't dequantized but for these sequences.
    """
    keys, values = state.keys[layer], state.values[layer]
    if state.key_scales is None or state.value_scales is None:
        return keys, values, prompts
    slots, end = prompts.slots_of_spans.long(), max(span.end for span in prompts.spans)
    both = (keys, state.key_scales[layer]), (values, state.value_scales[layer])
    keys, values = (
        dequantized_rows(codes[slots, :, :end], scales[slots, :, :end], dtype)
        for codes, scales in both
    )
    spans = tuple(replace(span, slot=number) for number, span in enumerate(prompts.spans))
    rows = torch.arange(len(spans) + 1, dtype=torch.int32, device=keys.device)
    return keys, values, replace(prompts, spans=spans, rows=rows * (keys.shape[1] * end))


def attend_to_cache(
    query: Tensor, keys: Tensor, values: Tensor, prompts: PackedPrompts, scale: float
) -> Tensor:
    """Attend from each token to all of its sequence up to itself.

    On a card by flash attention over the cache as it is: torch's own choice there, cuDNN, takes
    tens of milliseconds for a plan of each new shape, in each thread.

    Args:
        query: (tokens, heads, head_dim), rotated.
        keys: (slots, key-value heads, max_length, head_dim): a layer's cache, contiguous, with
            those of the tokens.
        values: The same.
        prompts: Whose tokens.
        scale: Of the scores.

    Returns:
        (tokens, heads * head_dim).
    """
    if _has_flash(query):
        return _by_flash(query, keys, values, prompts, scale).flatten(1)
    parts = query.split([span.count for span in prompts.spans])
    attended = [
        _alone(part, keys[span.slot, :, : span.end], values[span.slot, :, : span.end], scale)
        for part, span in zip(parts, prompts.spans, strict=True)
    ]
    return torch.cat(attended).flatten(1)


def _alone(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attend from the last tokens (tokens, heads, head_dim) of one sequence to all of it.

    On a CPU some tokens at a time: torch's kernel there multiplies by 512 keys even where all but
    a few of them are of later tokens.
    """
    step = CPU_TOKENS if query.device.type == "cpu" else len(query)
    if len(query) <= step:
        return _at_once(query, keys, values, scale, _mask(query, keys.shape[1]))
    end, mask = keys.shape[1] - len(query), _mask(query[:step], keys.shape[1])
    attended = []
    for part in query.split(step):
        end += len(part)
        seen = mask[step - len(part) :, keys.shape[1] - end :]
        attended.append(_at_once(part, keys[:, :end], values[:, :end], scale, seen))
    return torch.cat(attended)


def _mask(query: Tensor, length: int) -> Tensor:
    """Return what is added to scores (tokens, length), so that no later one is seen."""
    hidden = query.new_full((len(query), length), -torch.inf)
    return hidden.triu(length - len(query) + 1)


def _at_once(query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor) -> Tensor:
    """Attend from the last tokens (tokens, heads, head_dim) of a sequence to all of it."""
    count, length = len(query), keys.shape[1]
    attended = functional.scaled_dot_product_attention(
        *(query.transpose(0, 1)[None], keys[None], values[None]),
        attn_mask=mask if 1 < count < length else None,
        is_causal=count == length > 1,
        scale=scale,
        enable_gqa=query.shape[1] > keys.shape[0],
    )
    return attended[0].transpose(0, 1)


def _has_flash(query: Tensor) -> bool:
    fits = query.dtype in FLASH_DTYPES and query.shape[-1] in FLASH_HEAD_DIMS
    return query.is_cuda and fits and _flash_runs_on(query.device)


@functools.cache
def _flash_runs_on(device: torch.device) -> bool:
    is_new = torch.cuda.get_device_capability(device) >= OLDEST_FOR_FLASH
    return is_new and torch.backends.cuda.is_flash_attention_available()


def _by_flash(
    query: Tensor, keys: Tensor, values: Tensor, prompts: PackedPrompts, scale: float
) -> Tensor:
    """Attend by torch's flash attention: the cache is one long row of positions to it.

    Position p of slot s is its row s * heads * max_length + p, and heads are max_length rows
    apart; `ends` tells it how many rows of a sequence count.
    """
    slots, heads, length, dim = keys.shape
    rows = ((slots - 1) * heads + 1) * length
    cache = [part.as_strided((rows, heads, dim), (dim, length * dim, 1)) for part in (keys, values)]
    attended: Tensor = torch.ops.aten._flash_attention_forward(
        *(query, *cache, prompts.starts, prompts.rows),
        max(2, *(span.count for span in prompts.spans)),  # of 1 it would swap heads and tokens
        max(span.end for span in prompts.spans),
        0.0,
        True,  # noqa: FBT003 - causal, aligned at the end
        False,  # noqa: FBT003
        scale=scale,
        seqused_k=prompts.ends,
    )[0]
    return attended
