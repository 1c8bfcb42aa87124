"""Sequences that begin and end at different times, decoded together: one cache, many slots."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qtool.runtime.decode import step
from qtool.runtime.decode.captured import CapturedStep
from qtool.runtime.decode.ops import DecodeOps, DecodeState, new_state
from qtool.runtime.decode.prompts import PromptSpan, packed
from qtool.runtime.decode.weights import DecoderWeights
from qtool.settings import KvCache


class SlotRunner:
    """Runs the sequences of the first slots; how many run is decided anew for each step.

    Running sequences have no gaps between them: a step costs what one of the next `widths` costs.
    The caller counts how many tokens each slot holds: nothing here is read back from the device.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        ops: DecodeOps,
        *,
        max_length: int,
        slots: int,
        kv_cache: KvCache = "auto",
    ) -> None:
        """Allocate the cache.

        Raises:
            BackendError: a sliding window would count within `max_length`.
        """
        self.weights, self.ops = weights, ops
        self.max_length, self.slots = max_length, slots
        with torch.inference_mode(mode=False), torch.no_grad():
            self.state = new_state(
                weights, ops, max_length=max_length, batch=slots, kv_cache=kv_cache
            )
            steps = {width: self._first(width) for width in widths(slots)}
        self._steps = {w: CapturedStep(weights, ops, state) for w, state in steps.items()}

    @property
    def device(self) -> torch.device:
        """Return where it runs."""
        return self.state.keys.device

    @torch.no_grad()
    def prepare(self, lengths: Sequence[int] = ()) -> None:
        """Record the steps of all widths, on a card, so that no request waits for that.

        Before that it compiles what they need, and prompts of `lengths`, each below `max_length`.
        The sequences end.
        """
        self.ops.compile_ahead(lambda ops: self._run_all(lengths, ops))
        self.state.positions.zero_()
        for one in self._steps.values():
            one.prepare()

    def _run_all(self, lengths: Sequence[int], ops: DecodeOps) -> None:
        """Take a step of each width, read a prompt of each length, and draw."""
        for one in self._steps.values():
            logits = step.decode(self.weights, one.state, ops)
            ops.choose(logits, one.state)
        for length in lengths:
            tokens = torch.zeros(length, dtype=torch.int64, device=self.device)
            logits = self._read([PromptSpan(0, 0, length)], tokens, ops)
            ops.draw(logits, logits.argmax(-1), torch.ones(1, 4, dtype=torch.float64))

    @torch.no_grad()
    def read(self, spans: Sequence[PromptSpan], tokens: Tensor) -> Tensor:
        """Read prompts, or parts of prompts, together; return the logits after each.

        Those of the running sequences are read at once; others may be read part by part while steps
        are taken, in slots after the running ones, which leave them alone; such a prompt has fewer
        tokens than `max_length`.

        Args:
            spans: Of what tokens; each begins where its slot's sequence has got to, 0 begins anew.
            tokens: (tokens,) int64, those of the first span, then of the next.

        Returns:
            (spans, vocab_size).
        """
        return self._read(spans, tokens, self.ops)

    def _read(self, spans: Sequence[PromptSpan], tokens: Tensor, ops: DecodeOps) -> Tensor:
        prompts = packed(spans, self.state.keys)
        self.state.positions[prompts.slots_of_spans] = prompts.ends
        return step.prefill(self.weights, tokens, prompts, prompts.last, self.state, ops)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Append a token to each of the first sequences; each must have room for it.

        Args:
            tokens: (running,) int64.

        Returns:
            Logits (running, vocab_size) and the likeliest tokens (running,); the next call
            overwrites both.
        """
        count = len(tokens)
        width = next(width for width in self._steps if width >= count)
        self.state.tokens[:count] = tokens
        if width > count:
            self.state.positions[count:width] = -1  # nobody is there, or a prompt half read
        logits = self._steps[width].run()
        return logits[:count], self.state.tokens[:count]

    @torch.no_grad()
    def move(self, source: int, target: int, length: int) -> None:
        """Copy a sequence of `length` tokens to another slot."""
        state = self.state
        for buffer in state.cached().values():
            buffer[:, target, :, :length] = buffer[:, source, :, :length]
        state.positions[target] = state.positions[source]

    def _first(self, width: int) -> DecodeState:
        """Return the state of the first slots alone: the same buffers, and parts of its own."""
        state, shape = self.state, self.weights.shape
        return replace(
            state,
            **{name: buffer[:, :width] for name, buffer in state.cached().items()},
            tokens=state.tokens[:width],
            positions=state.positions[:width],
            history=state.history[:width],
            scratch=self.ops.scratch(shape, width, self.max_length, self.device),
        )


def widths(slots: int) -> list[int]:
    """Return the batch sizes that steps are made for: powers of two, and all slots."""
    return [*(2**power for power in range(slots.bit_length()) if 2**power < slots), slots]
