"""The loop of greedy search and of sampling, as transformers runs it, over a decode runner."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qtool.runtime.decode.cache import wanted_kv_cache
from qtool.runtime.decode.ops import DecodeOps
from qtool.runtime.decode.runner import DecodeRunner
from qtool.runtime.decode.weights import DecoderWeights

FIRST_ROOM = 2048
"""Tokens beyond the prompt that a cache is made for at first; it grows."""
ROOM_STEP = 256
KNOWN_CRITERIA = ("MaxLengthCriteria", "EosTokenCriteria")
"""They can be evaluated after the fact."""


@dataclass(slots=True)
class SharedRunner:
    """Weights and operations, and the runner that was last made of them."""

    weights: DecoderWeights
    ops: DecodeOps
    runner: DecodeRunner | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held by the one loop that uses the runner."""
    done: torch.cuda.Event | None = None
    """When the device has finished the last loop."""

    def take(self) -> bool:
        """Let this thread, and its CUDA stream, use the runner until `leave`; False: it is used."""
        taken = self.lock.acquire(blocking=False)
        if taken and self.done is not None:
            torch.cuda.current_stream(self._device).wait_event(self.done)
        return taken

    def leave(self) -> None:
        """Let others use the runner, as soon as the device has done what it was given."""
        if self._device.type == "cuda":
            self.done = torch.cuda.current_stream(self._device).record_event()
        self.lock.release()

    def begin(self, batch: int, length: int, limit: int) -> DecodeRunner:
        """Return a runner with room for prompts and some more: the last one if it will do."""
        room, kind, runner = (
            self._rounded(min(limit, length + FIRST_ROOM)),
            wanted_kv_cache(),
            self.runner,
        )
        fits = runner is not None and (runner.batch, runner.kv_cache) == (batch, kind)
        if runner is None or not fits or runner.max_length < room:
            self._finish()
            self.runner = runner = None  # frees its cache before the new one is made
            runner = DecodeRunner(
                self.weights, self.ops, max_length=room, batch=batch, kv_cache=kind
            )
            self.runner = runner
        return runner

    def go_on(self, limit: int) -> DecodeRunner:
        """Return a runner that can take a step: a larger one where the last is full."""
        assert self.runner is not None
        if self.runner.length == self.runner.max_length:
            larger = self.runner.grown(self._rounded(min(limit, 2 * self.runner.max_length)))
            self._finish()
            self.runner = larger
        return self.runner

    @property
    def _device(self) -> torch.device:
        return self.weights.final_norm.device

    def _finish(self) -> None:
        """Wait until the device doesn't use the runner, which another stream may have allocated."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _rounded(self, room: int) -> int:
        """Round up, so that prompts of nearly the same length share a runner."""
        rounded = -(-room // ROOM_STEP) * ROOM_STEP
        return min(rounded, self.weights.longest or rounded)


def sample(decoder: SharedRunner, input_ids: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Do what transformers' `_sample` does, for tokens alone.

    Args:
        decoder: Runs the model.
        input_ids: (batch, length), padded on the left where the attention mask says so.
        arguments: Of `_sample`: `generation_config`, `logits_processor` and others.

    Returns:
        (batch, length and more).
    """
    config, criteria = arguments["generation_config"], arguments["stopping_criteria"]
    processors, streamer = arguments["logits_processor"], arguments.get("streamer")
    batch, limit = len(input_ids), int(config.max_length)
    runner = decoder.begin(batch, input_ids.shape[1], limit)
    logits = runner.prefill(*_prompts(input_ids, arguments.get("attention_mask")))
    simple = all(type(one).__name__ in KNOWN_CRITERIA for one in criteria)
    if not config.do_sample and streamer is None and not len(processors) and simple:
        return _greedy(decoder, input_ids, logits, arguments)
    ends = any(hasattr(one, "eos_token_id") for one in criteria)
    unfinished = torch.ones(batch, dtype=torch.long, device=input_ids.device)
    while True:
        scores = processors(input_ids, logits.to(copy=True, dtype=torch.float32))
        if config.do_sample:
            tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = torch.argmax(scores, dim=-1)
        if ends:
            tokens = tokens * unfinished + config._pad_token_tensor * (1 - unfinished)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished = unfinished & ~criteria(input_ids, None)
        done = _Flag(unfinished.max() == 0)
        if input_ids.shape[1] < limit:  # runs while the host waits for the flag
            logits = decoder.go_on(limit).step(tokens)
        if done.value():
            break
    if streamer is not None:
        streamer.end()
    return input_ids


def _prompts(input_ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return prompts that begin at the left, and their lengths if they differ from all."""
    if mask is None or bool(mask.all()):
        return input_ids, None
    lengths = mask.long().sum(1)
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    moved = (places - lengths[:, None]) % input_ids.shape[1]
    return input_ids.gather(1, moved), lengths


def _greedy(
    decoder: SharedRunner, input_ids: Tensor, logits: Tensor, arguments: Mapping[str, Any]
) -> Tensor:
    """Choose all tokens on the device, then apply the criteria to what came out."""
    criteria = arguments["stopping_criteria"]
    limit = min(int(one.max_length) for one in criteria if hasattr(one, "max_length"))
    stops = [one.eos_token_id.tolist() for one in criteria if hasattr(one, "eos_token_id")]
    stop_ids = sorted({token for each in stops for token in each})
    parts, missing = [logits.argmax(-1)[:, None]], limit - input_ids.shape[1] - 1
    while missing > 0:
        runner = decoder.go_on(limit)
        count = min(missing, runner.max_length - runner.length)
        parts.append(runner.greedy(parts[-1][:, -1], count, stop_ids=stop_ids))
        missing -= count
        if parts[-1].shape[1] < count:
            break
    chosen = torch.cat(parts, dim=1)
    if stop_ids:
        pad = arguments["generation_config"]._pad_token_tensor
        chosen = _until_end(chosen, stop_ids, pad)
    return torch.cat([input_ids, chosen], dim=1)


def _until_end(chosen: Tensor, stop_ids: list[int], pad: Tensor) -> Tensor:
    """Pad each sequence after its first stop, and cut where all have stopped."""
    stops = torch.isin(chosen, torch.tensor(stop_ids, device=chosen.device)).long()
    before = stops.cumsum(1) - stops
    running = (before == 0).any(0)
    return torch.where(before == 0, chosen, pad)[:, : int(running.sum())]


class _Flag:
    """A truth value that comes from the device while host and device go on."""

    def __init__(self, value: Tensor) -> None:
        self._value, self._event = value, None
        if value.device.type == "cuda":
            self._value = torch.empty_like(value, device="cpu", pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def value(self) -> bool:
        """Wait for it."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._value)
