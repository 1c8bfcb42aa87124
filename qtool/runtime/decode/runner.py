"""Decodes token by token: a static cache, and on a card one CUDA graph per step."""

from collections.abc import Iterable

import torch
from torch import Tensor

from qtool.errors import BackendError
from qtool.runtime.decode import step
from qtool.runtime.decode.captured import CapturedStep
from qtool.runtime.decode.ops import DecodeOps, new_state
from qtool.runtime.decode.prompts import PromptSpan, packed
from qtool.runtime.decode.weights import DecoderWeights
from qtool.settings import KvCache

CHECK_EVERY = 16
"""Tokens between two looks of the host at whether all have ended; each waits for the device."""


class DecodeRunner:
    """Runs a batch of sequences; the caller asks for logits or for greedy tokens.

    `weights`, `ops` and the buffers `state` are fixed; `length` says how many tokens of the longest
    sequence are cached, `state.positions` how many of each.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        ops: DecodeOps,
        *,
        max_length: int,
        batch: int = 1,
        kv_cache: KvCache = "auto",
    ) -> None:
        """Allocate the cache.

        Raises:
            BackendError: a sliding window would count within `max_length`.
        """
        self.weights, self.ops = weights, ops
        self.max_length, self.batch, self.length = max_length, batch, 0
        self.kv_cache: KvCache = kv_cache
        with torch.inference_mode(mode=False), torch.no_grad():  # may be changed in either mode
            self.state = new_state(
                weights, ops, max_length=max_length, batch=batch, kv_cache=kv_cache
            )
        self.captured = CapturedStep(weights, ops, self.state)

    @property
    def device(self) -> torch.device:
        """Return where it runs."""
        return self.state.keys.device

    @torch.no_grad()
    def prefill(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Begin anew with prompts; return the logits after them, (batch, vocab_size).

        Args:
            ids: (batch, length) int64, each prompt from the left on.
            lengths: (batch,) of the prompts, 1 to length, on the same device; what follows a
                shorter one doesn't matter. None: all are as long as `ids`.

        Raises:
            BackendError: the prompts don't fit.
        """
        batch, length = ids.shape
        if batch != self.batch:
            raise BackendError(f"The runner decodes {self.batch} sequences, not {batch}.")
        self._check_room(0, length)
        if lengths is None:
            self.state.positions.fill_(length)
        else:
            self.state.positions.copy_(lengths)
        self.length = length
        # What follows a shorter prompt is read too, and seen by nothing: attention is causal, and
        # each step writes over it before it looks there.
        spans = [PromptSpan(row, 0, length) for row in range(batch)]
        prompts = packed(spans, self.state.keys)
        last = prompts.starts[:-1] + self.state.positions - 1
        return step.prefill(self.weights, ids.flatten(), prompts, last, self.state, self.ops)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens (batch,); return the logits after them, which the next step overwrites.

        Raises:
            BackendError: the cache is full.
        """
        self._check_room(self.length, 1)
        self.state.tokens.copy_(tokens)
        return self._advance()

    @torch.no_grad()
    def greedy(self, first: Tensor, count: int, *, stop_ids: Iterable[int] = ()) -> Tensor:
        """Append `first` (batch,), then the likeliest tokens, each after the one before.

        Args:
            first: Follows what is cached.
            count: How many tokens to choose after `first`.
            stop_ids: End early when each sequence holds one of these, counting `first`. What
                follows them in a sequence is still greedy.

        Returns:
            (batch, count or less) int64, without `first`.

        Raises:
            BackendError: they don't fit into the cache.
        """
        self._check_room(self.length, count)
        begin, stops = self.length, torch.tensor([*stop_ids], dtype=torch.int64)
        stops = stops.to(self.device)
        begins = self.state.positions.long()[:, None]
        places = begins + torch.arange(count + 1, device=self.device)
        self.state.tokens.copy_(first)
        self.state.history.scatter_(1, begins, self.state.tokens[:, None])
        for done in range(count):
            if len(stops) and done % CHECK_EVERY == 0:
                chosen = self.state.history.gather(1, places[:, : done + 1])
                if bool(torch.isin(chosen, stops).any(1).all()):
                    break
            self._advance()
        return self.state.history.gather(1, places[:, 1 : self.length - begin + 1])

    def grown(self, max_length: int) -> "DecodeRunner":
        """Return a runner with room for more that goes on where this one stands."""
        larger = DecodeRunner(
            self.weights,
            self.ops,
            max_length=max_length,
            batch=self.batch,
            kv_cache=self.kv_cache,
        )
        larger.length = used = self.length
        old, new = self.state, larger.state
        with torch.no_grad():
            for name, buffer in old.cached().items():
                new.cached()[name][:, :, :, :used] = buffer[:, :, :, :used]
            new.history[:, : used + 1] = old.history[:, : used + 1]
            new.tokens.copy_(old.tokens)
            new.positions.copy_(old.positions)
        return larger

    def _check_room(self, used: int, more: int) -> None:
        if used + more > self.max_length:
            raise BackendError(
                f"{used + more} tokens don't fit into a cache of {self.max_length}. Make the "
                "runner with a larger max_length, or shorten the prompt."
            )

    def _advance(self) -> Tensor:
        """Run one step and count it."""
        logits = self.captured.run()
        self.length += 1
        return logits
