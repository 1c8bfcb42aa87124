"""Prefill and decoding of a whole model through the decode runner, in tokens per second."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from qtool.runtime.decode.ops import DecodeOps
from qtool.runtime.decode.runner import DecodeRunner
from qtool.runtime.decode.weights import DecoderWeights
from qtool.timing.synthetic import generator_on

PROMPT_TOKENS, DECODE_TOKENS = 512, 128
REPEATS = 5


class Clock(Protocol):
    """Time and memory of a device; each reading waits for what was launched."""

    def seconds(self) -> float:
        """Return the time."""

    def memory(self) -> int:
        """Return the bytes in use, and start to look for the peak."""

    def peak_memory(self) -> int:
        """Return the most bytes in use since `memory`."""


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """A model to be run as a whole."""

    name: str
    load: Callable[[], DecoderWeights]


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


@torch.no_grad()
def time_decoder(model: EndToEnd, ops: DecodeOps, clock: Clock) -> EndToEndResult:
    """Load a model, run prompts and greedy decoding after them, and let go of it.

    Raises:
        QtoolError: the runner can't run it; the message says why.
    """
    before = clock.memory()
    weights = model.load()
    runner = DecodeRunner(weights, ops, max_length=PROMPT_TOKENS + DECODE_TOKENS)
    device = weights.final_norm.device
    prompt = torch.randint(
        weights.shape.vocab_size, (1, PROMPT_TOKENS), device=device, generator=generator_on(device)
    )
    clock.memory()
    prefill, decode = [], []
    for _ in range(REPEATS + 1):
        started = clock.seconds()
        first = runner.prefill(prompt).argmax(-1)
        prefilled = clock.seconds()
        runner.greedy(first, DECODE_TOKENS)
        prefill.append(prefilled - started)
        decode.append(clock.seconds() - prefilled)
    return EndToEndResult(
        name=model.name,
        prefill_tokens_per_second=PROMPT_TOKENS / statistics.median(prefill[1:]),
        decode_tokens_per_second=DECODE_TOKENS / statistics.median(decode[1:]),
        prompt_tokens=PROMPT_TOKENS,
        decode_tokens=DECODE_TOKENS,
        repeats=REPEATS,
        peak_memory_bytes=clock.peak_memory() - before,
    )
