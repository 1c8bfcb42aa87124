"""Continuous batching: sequences join and leave between steps; one thread at a time may use it."""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qtool.serving.decoders import SlotDecoder
from qtool.serving.sampling import PendingTokens, Sampler, next_tokens
from qtool.serving.tokens import Event, FailureEvent, Finish, TokenEvent, TokenRequest

NO_PROMPT_MEMORY = "There is no memory for a prompt of {} tokens. Send a shorter one."


@dataclass(slots=True, eq=False)
class _Sequence:
    """A request, and how far it is."""

    request: TokenRequest
    sampler: Sampler
    launched: int = 0
    """Tokens whose choice the device was told."""
    received: int = 0
    """Those that have arrived here."""
    done: bool = False

    @property
    def length(self) -> int:
        """Return how many tokens its slot holds."""
        return len(self.request.prompt) + self.launched - 1


@dataclass(slots=True)
class _Step:
    """What the device was told to do."""

    sequences: list[_Sequence]
    tokens: PendingTokens


@dataclass(slots=True)
class Batch:
    """Runs requests in the slots of a decoder, in the order in which they came."""

    decoder: SlotDecoder
    _waiting: deque[_Sequence] = field(default_factory=deque)
    _running: list[_Sequence] = field(default_factory=list)
    """By slot."""
    _tokens: Tensor | None = None
    """(running,) the last of each, on the device."""
    _steps: deque[_Step] = field(default_factory=deque)

    @property
    def num_running(self) -> int:
        """Return how many sequences are in slots."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Return how many sequences wait for a slot."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Return whether there is nothing to do."""
        return not (self._waiting or self._running or self._steps)

    def add(self, request: TokenRequest) -> None:
        """Let a sequence wait for its slot."""
        self._waiting.append(_Sequence(request, Sampler(request.sampling)))

    def cancel(self, keys: frozenset[Hashable]) -> None:
        """Forget sequences, wherever they are; nothing more is said of them."""
        alive = [one for one in self._waiting if one.request.key not in keys]
        self._waiting = deque(alive)
        unread = [one for step in self._steps for one in step.sequences]
        for one in [*self._running, *unread]:
            if one.request.key in keys:
                one.done = True
        self._free()

    @torch.no_grad()
    def advance(self) -> list[Event]:
        """Begin what has room, or take a step of all; return the tokens that have arrived.

        First tokens are returned before the next step, which takes long without a card.
        """
        events = self._admit()
        events += self._read(self.decoder.lookahead if self._running else 0)
        if self._running and not events:
            self._launch()
            events += self._read(self.decoder.lookahead if self._running else 0)
        return events

    def _admit(self) -> list[Event]:
        """Read the prompts of those that wait, as many at once as the decoder takes."""
        free, chosen, longest = self.decoder.slots - len(self._running), list[_Sequence](), 0
        while self._waiting and len(chosen) < free:
            longest = max(longest, len(self._waiting[0].request.prompt))
            if chosen and longest * (len(chosen) + 1) > self.decoder.prefill_tokens:
                break
            chosen.append(self._waiting.popleft())
        if not chosen:
            return []
        try:
            prompts = [one.request.prompt for one in chosen]
            logits = self.decoder.prefill(len(self._running), prompts)
        except torch.OutOfMemoryError:
            return [
                FailureEvent(one.request.key, NO_PROMPT_MEMORY.format(longest)) for one in chosen
            ]
        first = self._choose(chosen, logits, logits.argmax(-1))
        self._tokens = first if self._tokens is None else torch.cat([self._tokens, first])
        self._running += chosen
        self._free()
        return []

    def _launch(self) -> None:
        """Take a step of all that run."""
        assert self._tokens is not None
        logits, likeliest = self.decoder.step(self._tokens)
        self._tokens = self._choose(list(self._running), logits, likeliest)
        self._free()

    def _choose(self, sequences: list[_Sequence], logits: Tensor, likeliest: Tensor) -> Tensor:
        """Choose a token for each, and send them on their way."""
        samplers = [one.sampler for one in sequences]
        tokens = next_tokens(logits, likeliest, samplers, self.decoder.draw)
        self._steps.append(_Step(sequences, PendingTokens(tokens, logits, samplers)))
        for one in sequences:
            one.launched += 1
        return tokens

    def _read(self, keep: int) -> list[Event]:
        """Return the tokens of all steps but the last few."""
        events: list[Event] = []
        while len(self._steps) > keep:
            step = self._steps.popleft()
            for one, (token, logprobs) in zip(step.sequences, step.tokens.read(), strict=True):
                if one.done:
                    continue
                one.received += 1
                full = one.received == one.request.max_tokens
                finish: Finish | None = "length" if full else None
                finish = "stop" if token in one.request.stop_ids else finish
                one.done = finish is not None
                events.append(TokenEvent(one.request.key, token, logprobs, finish))
            self._free()
        return events

    def _free(self) -> None:
        """Take out of their slots what has ended, or has all its tokens on the way."""
        for slot in reversed(range(len(self._running))):
            one = self._running[slot]
            if not one.done and one.launched < one.request.max_tokens:
                continue
            last = self._running.pop()
            assert self._tokens is not None
            self.decoder.remove(slot, len(self._running), last.length)
            if last is not one:
                self._running[slot] = last
                self._tokens = self._tokens.clone()  # those of the step may still be read
                self._tokens[slot] = self._tokens[-1]
            self._tokens = self._tokens[:-1]
