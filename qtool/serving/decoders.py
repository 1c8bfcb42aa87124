"""What runs sequences in slots: the decode runner of a card, or transformers' forward anywhere."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from qtool.base import CausalModel
from qtool.runtime.decode.slots import SlotRunner
from qtool.serving.drawing import TokenDrawer
from qtool.serving.sampling import draw_tokens

WARM_LENGTHS = (1, 16, 64, 512)


class SlotDecoder(Protocol):
    """Runs sequences in the slots 0 to running - 1, without gaps."""

    slots: int
    max_length: int
    """Tokens of a sequence, prompt and answer."""
    lookahead: int
    """Steps to launch before the tokens of the one before are read."""
    prefill_tokens: int
    """Most tokens of prompts that are read at once, the longest counted for all; one prompt may
    have more."""

    @property
    def device(self) -> torch.device:
        """Return where tokens and logits are."""
        ...

    def prepare(self) -> None:
        """Do what would make the first requests wait."""
        ...

    def prefill(self, first: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Begin sequences in slots from `first` on; return (prompts, vocab_size) logits."""
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

    prefill_tokens = 8192

    def __init__(self, runner: SlotRunner) -> None:
        self._runner, self.slots, self.max_length = runner, runner.slots, runner.max_length
        self.lookahead = int(runner.device.type == "cuda")  # elsewhere a step ends in its call
        self._drawer = TokenDrawer(runner.slots, runner.device)

    @property
    def device(self) -> torch.device:
        """Return where the runner is."""
        return self._runner.device

    def prepare(self) -> None:
        """Record the steps, and compile what prompts of usual lengths need, on a card."""
        if self.device.type != "cuda":
            return
        self._runner.prepare()
        for length in WARM_LENGTHS:
            if length < self.max_length:
                logits = self.prefill(0, [[0] * length])
                self._drawer.prepare(logits)

    def prefill(self, first: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts of any lengths together."""
        longest = max(map(len, prompts))
        padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        ids = torch.tensor(padded).to(self.device, non_blocking=True)  # the host goes on
        lengths = torch.tensor(list(map(len, prompts))).to(self.device, non_blocking=True)
        return self._runner.prefill(first, ids, lengths)

    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step of all."""
        return self._runner.step(tokens)

    def draw(self, logits: Tensor, likeliest: Tensor, options: Tensor) -> Tensor:
        """Draw on the device: by a graph on a card."""
        return self._drawer(logits, likeliest, options)

    def remove(self, slot: int, last: int, length: int) -> None:
        """Copy the last sequence into the gap."""
        if slot != last:
            self._runner.move(last, slot, length)


class ForwardDecoder:
    """Any model of transformers on any device, a sequence at a time: as `generate` has it.

    Each slot has a cache of its own, so what comes out doesn't depend on who else is there.
    """

    lookahead, prefill_tokens = 0, 0

    def __init__(self, model: CausalModel, *, max_length: int, slots: int) -> None:
        self._model: Any = model
        self.max_length, self.slots = max_length, slots
        self._caches: list[Any] = [None] * slots
        keeps = getattr(model, "_supports_logits_to_keep", lambda: False)()
        self._keep = {"logits_to_keep": 1} if keeps else {}

    @property
    def device(self) -> torch.device:
        """Return where the model is."""
        return torch.device(self._model.device)

    def prepare(self) -> None:
        """Do nothing."""

    @torch.inference_mode()
    def prefill(self, first: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts one after the other."""
        rows = []
        for slot, prompt in enumerate(prompts, first):
            self._caches[slot] = None
            rows.append(self._forward(slot, torch.tensor([list(prompt)], device=self.device)))
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
        output = self._model(ids, past_key_values=self._caches[slot], use_cache=True, **self._keep)
        self._caches[slot] = output.past_key_values
        return output.logits[:, -1].float()
