"""Prefill and decoding of a whole model through the decode runner, in tokens per second."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qtool.runtime.decode.cache import bytes_per_token, wanted_kv_cache
from qtool.runtime.decode.ops import DecodeOps
from qtool.runtime.decode.runner import DecodeRunner
from qtool.runtime.decode.weights import DecoderWeights
from qtool.runtime.tensor_parallel import TensorParallel
from qtool.settings import KvCache
from qtool.timing.machine import Clock
from qtool.timing.synthetic import generator_on
from qtool.timing.timing import time_tokens

PROMPT_TOKENS, DECODE_TOKENS = 512, 128
REPEATS = 5


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """A model to be run as a whole."""

    name: str
    load: Callable[..., DecoderWeights]
    """Takes the group of ranks that share the model, if any."""


@dataclass(frozen=True, slots=True)
class EndToEndResult:
    """Medians at batch 1; the first repeat warms up and isn't counted."""

    name: str
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prompt_tokens: int
    decode_tokens: int
    repeats: int
    peak_memory_bytes: int
    """Weights, cache and activations while it ran; not what loading took for a moment."""
    kv_cache: KvCache = "auto"
    """How keys and values were kept."""
    kv_cache_bytes_per_token: int = 0


@torch.no_grad()
def time_decoder(
    model: EndToEnd, ops: DecodeOps, clock: Clock, group: TensorParallel | None = None
) -> EndToEndResult:
    """Load a model, run prompts and greedy decoding after them, and let go of it.

    Of a group, every rank does so at once.

    Raises:
        QtoolError: the runner can't run it; the message says why.
    """
    before = clock.memory()
    weights = model.load() if group is None else model.load(group)
    kind, length = wanted_kv_cache(), PROMPT_TOKENS + DECODE_TOKENS
    runner = DecodeRunner(weights, ops, max_length=length, kv_cache=kind)
    device = weights.final_norm.device
    prompt = torch.randint(
        weights.shape.vocab_size, (1, PROMPT_TOKENS), device=device, generator=generator_on(device)
    )
    clock.memory()
    prefill, decode = time_tokens(
        lambda: runner.prefill(prompt).argmax(-1),
        lambda first: runner.greedy(first, DECODE_TOKENS),
        clock.seconds,
        REPEATS,
    )
    return EndToEndResult(
        name=model.name,
        prefill_tokens_per_second=PROMPT_TOKENS / prefill,
        decode_tokens_per_second=DECODE_TOKENS / decode,
        prompt_tokens=PROMPT_TOKENS,
        decode_tokens=DECODE_TOKENS,
        repeats=REPEATS,
        peak_memory_bytes=clock.peak_memory() - before,
        kv_cache=kind,
        kv_cache_bytes_per_token=bytes_per_token(weights, kind),
    )
