"""A model on the CPU: by threads, beside its original, as a share of what memory can give."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from qtool.core.threads import num_threads
from qtool.modeling.load import LoadedModel
from qtool.runtime.backends.cpu.decode_step import NativeStep
from qtool.timing.processor import Processor
from qtool.timing.runs import RunnerRuns, Runs, runs_of, span_bytes
from qtool.timing.synthetic import generator_on
from qtool.timing.timing import time_tokens


@dataclass(frozen=True, slots=True)
class CpuProtocol:
    """What is run of each model: a long prompt, and tokens after a short one."""

    prompt_tokens: int = 512
    context_tokens: int = 16
    decode_tokens: int = 32
    repeats: int = 3
    """That count; one more warms up."""


@dataclass(frozen=True, slots=True)
class CpuSpeed:
    """One model by one number of threads, at batch 1: medians."""

    name: str
    by: str
    """What ran it."""
    threads: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    weight_bytes: int
    """Read for each token."""
    bandwidth_share: float
    """Of what so many threads read, the weights alone counted."""


@dataclass(frozen=True, slots=True)
class CpuSpan:
    """A part of a decoding step, summed over the blocks."""

    name: str
    microseconds: float  # per token
    weight_bytes: int
    bandwidth_share: float | None
    """None: it reads no weights."""


@dataclass(frozen=True, slots=True)
class CpuSpans:
    """Where the time of a token goes, by all threads."""

    spans: tuple[CpuSpan, ...]
    outside_share: float
    """What isn't spent in the native step: Python."""


@dataclass(frozen=True, slots=True)
class CpuResult:
    """All that was timed, and on what."""

    processor: Processor
    protocol: CpuProtocol
    speeds: tuple[CpuSpeed, ...]
    spans: CpuSpans | None
    """Of the quantized model; None: its steps aren't native."""
    not_run: dict[str, str] = field(default_factory=dict)
    """What wasn't timed, and why."""


def protocol_for(positions: int | None) -> CpuProtocol:
    """Return what is run of a model that has so many positions; None: it doesn't say."""
    usual = CpuProtocol()
    if positions is None:
        return usual
    context = min(usual.context_tokens, max(1, positions // 4))
    return CpuProtocol(
        prompt_tokens=min(usual.prompt_tokens, positions),
        context_tokens=context,
        decode_tokens=min(usual.decode_tokens, positions - context),
    )


class CpuBench:
    """Times models, one after the other, by the same protocol."""

    def __init__(self, processor: Processor, protocol: CpuProtocol = CpuProtocol()) -> None:
        self.processor, self.protocol = processor, protocol

    @torch.inference_mode()
    def speeds(self, loaded: LoadedModel, name: str) -> list[CpuSpeed]:
        """Return the speed of a model by each number of threads, by what `generate` uses."""
        runs, source = self._runs(loaded), generator_on(loaded.device)
        vocabulary = loaded.model.config.get_text_config().vocab_size
        sizes = (self.protocol.prompt_tokens, self.protocol.context_tokens)
        prompts = [torch.randint(vocabulary, (1, size), generator=source) for size in sizes]
        return [self._speed(runs, name, prompts, count) for count in self.processor.read_bandwidth]

    @torch.inference_mode()
    def spans(self, loaded: LoadedModel) -> CpuSpans | None:
        """Return where the time of a token goes; None: the model's steps aren't one native call."""
        runs = self._runs(loaded)
        step = runs.runner.captured.whole if isinstance(runs, RunnerRuns) else None
        if not isinstance(runs, RunnerRuns) or not isinstance(step, NativeStep):
            return None
        prompt = torch.zeros(1, self.protocol.context_tokens, dtype=torch.int64)
        runs.decode(runs.prefill(prompt))  # warms up
        first = runs.prefill(prompt)
        with step.timed() as seconds:
            begin = time.perf_counter()
            runs.decode(first)
            spent = time.perf_counter() - begin
        sizes = span_bytes(runs.runner.weights)
        parts = tuple(self._span(name, one, sizes) for name, one in seconds.items())
        return CpuSpans(parts, 1 - sum(seconds.values()) / spent)

    def _span(self, name: str, seconds: float, sizes: dict[str, int]) -> CpuSpan:
        each, size = seconds / self.protocol.decode_tokens, sizes.get(name, 0)
        share = size / each / self.processor.read_bandwidth[self.processor.cores]
        return CpuSpan(name, 1e6 * each, size, share if name in sizes else None)

    def _runs(self, loaded: LoadedModel) -> Runs:
        protocol = self.protocol
        room = max(protocol.prompt_tokens, protocol.context_tokens + protocol.decode_tokens)
        return runs_of(loaded, protocol.decode_tokens, room=room)

    def _speed(self, runs: Runs, name: str, prompts: Sequence[Tensor], threads: int) -> CpuSpeed:
        protocol, bandwidth = self.protocol, self.processor.read_bandwidth[threads]
        long, short = (partial(runs.prefill, prompt) for prompt in prompts)
        with num_threads(threads):
            read, _ = time_tokens(long, id, time.perf_counter, protocol.repeats)
            _, decode = time_tokens(short, runs.decode, time.perf_counter, protocol.repeats)
        return CpuSpeed(
            name=name,
            by=runs.by,
            threads=threads,
            prefill_tokens_per_second=protocol.prompt_tokens / read,
            decode_tokens_per_second=protocol.decode_tokens / decode,
            weight_bytes=runs.weight_bytes,
            bandwidth_share=runs.weight_bytes * protocol.decode_tokens / decode / bandwidth,
        )
