"""What runs sequences in slots: the decode runner of a card, or transformers' forward anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qtool.base import CausalModel
from qtool.runtime.decode.prompts import PromptSpan
from qtool.runtime.decode.slots import SlotRunner
from qtool.runtime.kept_states import NOTHING_READ, ReadSoFar, go_on
from qtool.serving.drawing import TokenDrawer
from qtool.serving.sampling import draw_tokens

WARM_LENGTHS = (1, 16, 32, 48, 64, 96, 128, 192, 256, 2048)
"""Of prompts: each has kernels of its own."""
PROMPT_TOKENS_ALONE, PROMPT_TOKENS_BESIDE = 2048, 512
"""The second is what a step of the others waits for at most."""


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Tokens of a prompt that follow one another."""

    slot: int
    begin: int
    """How many tokens of the prompt were read before."""
    tokens: Sequence[int]


class SlotDecoder(Protocol):
    """Runs sequences in the slots 0 to running - 1, without gaps."""

    slots: int
    max_length: int
    """Tokens of a sequence, prompt and answer."""
    lookahead: int
    """Steps to launch before the tokens of the one before are read."""
    prompts_at_once: int
    """Prompts that one call reads."""

    @property
    def device(self) -> torch.device:
        """Return where tokens and logits are."""
        ...

    def prepare(self) -> None:
        """Do what would make the first requests wait."""
        ...

    def prompt_tokens(self, running: int) -> int:
        """Return how many tokens of prompts to read between two steps of so many sequences."""
        ...

    def read(self, parts: Sequence[PromptPart]) -> Tensor:
        """Read parts of prompts; return the logits after each, (parts, vocab_size)."""
        ...

    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Append (running,) tokens; return (running, vocab_size) logits and the likeliest tokens.

        The next call may overwrite both.
        """
        ...

    def draw(self, logits: Tensor, likeliest: Tensor, options: Tensor) -> Tensor:
        """Return a new tensor of tokens (rows,) as `draw_tokens` does."""
        ...

    def remove(self, slot: int, last: int, length: int) -> None:
        """End the sequence of a slot: that of slot `last`, of `length` tokens, takes its place."""
        ...


class RunnerDecoder:
    """The decode runner: one graph, or call, for all sequences."""

    def __init__(self, runner: SlotRunner) -> None:
        self._runner, self.slots, self.max_length = runner, runner.slots, runner.max_length
        self.lookahead = int(runner.device.type == "cuda")  # elsewhere a step ends in its call
        self.prompts_at_once = runner.slots
        self._drawer = TokenDrawer(runner.slots, runner.device)

    @property
    def device(self) -> torch.device:
        """Return where the runner is."""
        return self._runner.device

    def prepare(self) -> None:
        """Record the steps, and compile what prompts of usual lengths need, on a card."""
        if self.device.type != "cuda":
            return
        lengths = [length for length in WARM_LENGTHS if length < self.max_length]
        self._runner.prepare(lengths)
        for length in lengths:
            logits = self.read([PromptPart(0, 0, [0] * length)])
            self.draw(logits, logits.argmax(-1), torch.ones(1, 4, dtype=torch.float64))

    def prompt_tokens(self, running: int) -> int:
        """Return more if nobody waits for the next step."""
        return PROMPT_TOKENS_BESIDE if running else PROMPT_TOKENS_ALONE

    def read(self, parts: Sequence[PromptPart]) -> Tensor:
        """Read parts of any lengths together."""
        spans = [PromptSpan(part.slot, part.begin, len(part.tokens)) for part in parts]
        tokens = torch.tensor([token for part in parts for token in part.tokens])
        return self._runner.read(spans, tokens.to(self.device, non_blocking=True))

    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step of all."""
        return self._runner.step(tokens)

    def draw(self, logits: Tensor, likeliest: Tensor, options: Tensor) -> Tensor:
        """Draw on the device: on a card by a kernel, or else by a graph."""
        drawn = self._runner.ops.draw(logits, likeliest, options)
        return self._drawer(logits, likeliest, options) if drawn is None else drawn

    def remove(self, slot: int, last: int, length: int) -> None:
        """Copy the last sequence into the gap."""
        if slot != last:
            self._runner.move(last, slot, length)


class ForwardDecoder:
    """Any model of transformers on any device, a sequence at a time: as `generate` has it.

    Each slot has a cache of its own, so what comes out doesn't depend on who else is there.
    """

    lookahead, prompts_at_once = 0, 1

    def __init__(self, model: CausalModel, *, max_length: int, slots: int) -> None:
        self._model: Any = model
        self.max_length, self.slots = max_length, slots
        self._caches: list[ReadSoFar | None] = [None] * slots
        keeps = getattr(model, "_supports_logits_to_keep", lambda: False)()
        self._keep = {"logits_to_keep": 1} if keeps else {}

    @property
    def device(self) -> torch.device:
        """Return where the model is."""
        return torch.device(self._model.device)

    def prepare(self) -> None:
        """Do nothing."""

    def prompt_tokens(self, running: int) -> int:
        """Return as many as a prompt may have."""
        del running
        return self.max_length

    @torch.inference_mode()
    def read(self, parts: Sequence[PromptPart]) -> Tensor:
        """Read one after the other."""
        rows = []
        for part in parts:
            if part.begin == 0:
                self._caches[part.slot] = None
            ids = torch.tensor([list(part.tokens)], device=self.device)
            rows.append(self._forward(part.slot, ids))
        return torch.cat(rows)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step of each."""
        rows = [self._forward(slot, token.view(1, 1)) for slot, token in enumerate(tokens)]
        logits = torch.cat(rows)
        return logits, logits.argmax(-1)

    def draw(self, logits: Tensor, likeliest: Tensor, options: Tensor) -> Tensor:
        """Draw on the device."""
        return draw_tokens(logits, likeliest, options)

    def remove(self, slot: int, last: int, length: int) -> None:
        """Let go of a cache."""
        del length
        self._caches[slot] = self._caches[last]
        self._caches[last] = None

    def _forward(self, slot: int, ids: Tensor) -> Tensor:
        kept = self._caches[slot] or NOTHING_READ
        output, self._caches[slot] = go_on(self._model, ids, kept, self._keep)
        return output.logits[:, -1].float()
