"""Continuous batching: sequences join and leave between steps; one thread at a time may use it."""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qtool.serving.decoders import PromptPart, SlotDecoder
from qtool.serving.sampling import PendingTokens, Sampler, next_tokens
from qtool.serving.tokens import Event, FailureEvent, Finish, TokenEvent, TokenRequest

NO_PROMPT_MEMORY = "There is no memory for a prompt of {} tokens. Send a shorter one."


@dataclass(slots=True, eq=False)
class _Sequence:
    """A request, and how far it is."""

    request: TokenRequest
    sampler: Sampler
    slot: int = 0
    """Where its prompt is read."""
    read: int = 0
    """Tokens of the prompt whose reading the device was told."""
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
    _partly_read: _Sequence | None = None
    """In a slot after the running ones: they go on while a long prompt is read."""
    _read_since_step: int = 0
    """Tokens of prompts."""
    _tokens: Tensor | None = None
    """(running,) the last of each, on the device."""
    _steps: deque[_Step] = field(default_factory=deque)

    @property
    def num_running(self) -> int:
        """Return how many sequences are in slots."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Return how many sequences don't run yet."""
        return len(self._waiting) + (self._partly_read is not None)

    @property
    def is_idle(self) -> bool:
        """Return whether there is nothing to do."""
        return not (self.num_waiting or self._running or self._steps)

    def add(self, request: TokenRequest) -> None:
        """Let a sequence wait for its slot."""
        self._waiting.append(_Sequence(request, Sampler(request.sampling)))

    def cancel(self, keys: frozenset[Hashable]) -> None:
        """Forget sequences, wherever they are; nothing more is said of them."""
        alive = [one for one in self._waiting if one.request.key not in keys]
        self._waiting = deque(alive)
        if self._partly_read is not None and self._partly_read.request.key in keys:
            self._partly_read = None
        unread = [one for step in self._steps for one in step.sequences]
        for one in [*self._running, *unread]:
            if one.request.key in keys:
                one.done = True
        self._free()

    @torch.no_grad()
    def advance(self) -> list[Event]:
        """Read prompts, so much between two steps, or take a step of all; return what arrived."""
        failures, steps = list[Event](), len(self._steps)
        if not self._running:
            self._read_since_step = 0  # nobody waits for a step
        budget = self.decoder.prompt_tokens(len(self._running)) - self._read_since_step
        if self.num_waiting and len(self._running) < self.decoder.slots and budget > 0:
            failures = self._read_prompts(budget)
        elif self._running:
            self._read_since_step = 0
            self._launch()
        is_ahead = self._running and len(self._steps) > steps
        return failures + self._receive(self.decoder.lookahead if is_ahead else 0)

    def _read_prompts(self, budget: int) -> list[Event]:
        """Read so many tokens of prompts, or fewer; sequences whose prompts are read then run."""
        taken = self._next_parts(budget)
        self._read_since_step += sum(len(part.tokens) for _, part in taken)
        try:
            logits = self.decoder.read([part for _, part in taken])
        except torch.OutOfMemoryError:
            longest = max(len(one.request.prompt) for one, _ in taken)
            message = NO_PROMPT_MEMORY.format(longest)
            return [FailureEvent(one.request.key, message) for one, _ in taken]
        ended = [one for one, _ in taken if one.read == len(one.request.prompt)]
        if len(ended) < len(taken):
            self._partly_read = taken[-1][0]
        if ended:
            logits = logits[: len(ended)]
            first = self._choose(ended, logits, logits.argmax(-1))
            self._tokens = first if self._tokens is None else torch.cat([self._tokens, first])
            self._running += ended
            self._free()
        return []

    def _next_parts(self, budget: int) -> list[tuple[_Sequence, PromptPart]]:
        """Return what to read, in slots after the running ones; all but the last to their ends."""
        slot = len(self._running)
        end = min(self.decoder.slots, slot + self.decoder.prompts_at_once)
        taken: list[tuple[_Sequence, PromptPart]] = []
        while self.num_waiting and slot < end and budget > 0:
            one = self._partly_read or self._waiting.popleft()
            if one is self._partly_read and one.slot != slot:  # others have ended since
                self.decoder.remove(slot, one.slot, one.read)
            self._partly_read = None
            part = one.request.prompt[one.read : one.read + budget]
            taken.append((one, PromptPart(slot, one.read, part)))
            one.slot, one.read = slot, one.read + len(part)
            budget, slot = budget - len(part), slot + 1
        return taken

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

    def _receive(self, keep: int) -> list[Event]:
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
