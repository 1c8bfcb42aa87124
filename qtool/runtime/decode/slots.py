"""Sequences that begin and end at different times, decoded together: one cache, many slots."""

from dataclasses import replace

import torch
from torch import Tensor

from qtool.runtime.decode import step
from qtool.runtime.decode.captured import CapturedStep
from qtool.runtime.decode.ops import DecodeOps, DecodeState, new_state
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
    def prepare(self) -> None:
        """Record the steps of all widths, on a card, so that no request waits for that."""
        for one in self._steps.values():
            one.prepare()

    @torch.no_grad()
    def prefill(self, first: int, ids: Tensor, lengths: Tensor) -> Tensor:
        """Begin sequences in slots from `first` on; return the logits after their prompts.

        Args:
            first: The slot of the first prompt; the others follow.
            ids: (prompts, longest) int64, each from the left on; what follows a shorter one doesn't
                matter.
            lengths: (prompts,) of the prompts, 1 to longest, on the same device.

        Returns:
            (prompts, vocab_size).
        """
        places = slice(first, first + len(ids))
        state = self.state
        part = replace(
            state,
            **{name: buffer[:, places] for name, buffer in state.cached().items()},
            positions=state.positions[places],
            scratch=None,
        )
        part.positions.copy_(lengths)
        return step.prefill(self.weights, ids, part, self.ops)

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
            self.state.positions[count:width] = 0  # nobody is there; its position would grow
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
