"""Sequences of a model that ranks share: rank 0 decides, the others repeat what it does."""

import signal
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from qtool.runtime.tensor_parallel import TensorParallel
from qtool.serving.decoders import PromptPart, SlotDecoder


class LeadingDecoder:
    """The decoder of rank 0: tells the others of each call that changes sequences."""

    def __init__(self, decoder: SlotDecoder, group: TensorParallel) -> None:
        self._decoder, self._group = decoder, group
        self.slots, self.max_length = decoder.slots, decoder.max_length
        self.lookahead, self.prompts_at_once = decoder.lookahead, decoder.prompts_at_once

    @property
    def device(self) -> torch.device:
        """Return where tokens and logits of rank 0 are."""
        return self._decoder.device

    def prepare(self) -> None:
        """Do what would make the first requests wait; the others do it by themselves."""
        self._decoder.prepare()

    def prompt_tokens(self, running: int) -> int:
        """Return what this rank's decoder says: the others read what it reads."""
        return self._decoder.prompt_tokens(running)

    def read(self, parts: Sequence[PromptPart]) -> Tensor:
        """Read parts of prompts on all ranks."""
        self._group.of_leader(("read", list(parts)))
        return self._decoder.read(parts)

    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Append tokens on all ranks, which get them from this one's device."""
        self._group.of_leader(("step", len(tokens)))
        return self._decoder.step(self._group.broadcast(tokens.contiguous()))

    def draw(self, logits: Tensor, likeliest: Tensor, options: Tensor) -> Tensor:
        """Draw here: the others learn of it by the next step."""
        return self._decoder.draw(logits, likeliest, options)

    def remove(self, slot: int, last: int, length: int) -> None:
        """End a sequence on all ranks."""
        self._group.of_leader(("remove", slot, last, length))
        self._decoder.remove(slot, last, length)

    def end(self) -> None:
        """Let the others go."""
        self._group.of_leader(("end",))


def follow(decoder: SlotDecoder, group: TensorParallel) -> None:
    """Repeat what rank 0 does until it ends; signals are left to it, which ends in order."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    while True:
        match group.of_leader():
            case ("read", parts):
                decoder.read(parts)
            case ("step", running):
                tokens = torch.empty(running, dtype=torch.int64, device=decoder.device)
                decoder.step(group.broadcast(tokens))
            case ("remove", slot, last, length):
                decoder.remove(slot, last, length)
            case _:
                return
