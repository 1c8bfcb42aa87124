"""Take the next tokens of a batch from its logits, each by options of its own; no host waits.

A sampled token comes from one random number per step by the inverse of the cumulative distribution.
The host draws that number before it knows the logits, from the request's own seed: so neither the
device nor who else is in the batch changes what a seed gives, but for rounding of the logits.
"""

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qtool.core.nucleus import sample_nucleus
from qtool.serving.tokens import SamplingOptions, TokenLogprobs

PLUS = 2**64
"""Where numbers of seeds below zero go on."""


class Sampler:
    """Options of one sequence, and its random numbers."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        seed = options.seed
        if seed is not None and seed < 0:
            seed = PLUS - seed  # Python takes -1 for 1
        self._random = random.Random(seed)  # not for secrets

    @property
    def is_greedy(self) -> bool:
        """Return whether the likeliest token is taken."""
        return self.options.temperature == 0

    def draw(self) -> float:
        """Return the next number in [0, 1)."""
        return 0.0 if self.is_greedy else self._random.random()


def draw_tokens(logits: Tensor, likeliest: Tensor, options: Tensor) -> Tensor:
    """Return tokens (rows,) int64: drawn, or the likeliest where a row wants that.

    Args:
        logits: (rows, vocab_size).
        likeliest: (rows,) int64, their maxima.
        options: (rows, 4) float64 on any device: temperature, top_p, a number in [0, 1), and 1 for
            the likeliest, else 0.
    """
    on_host = options.device.type == "cpu"
    without = on_host and not bool((options[:, 1] < 1).any())
    moved = options.to(logits.device, non_blocking=True)
    temperatures, top_p, numbers, likely = moved.split(1, dim=1)
    sampled = sample_nucleus(logits, likeliest, temperatures, None if without else top_p, numbers)
    return torch.where(likely[:, 0] > 0, likeliest, sampled)


Draw = Callable[[Tensor, Tensor, Tensor], Tensor]


def next_tokens(
    logits: Tensor, likeliest: Tensor, samplers: Sequence[Sampler], draw: Draw = draw_tokens
) -> Tensor:
    """Return the tokens (rows,) int64 that follow.

    Args:
        logits: (rows, vocab_size).
        likeliest: (rows,) int64, their maxima.
        samplers: Of each row; each draws a number.
        draw: Does what `draw_tokens` does.
    """
    rows = [
        (one.options.temperature or 1.0, one.options.top_p, one.draw(), one.is_greedy)
        for one in samplers
    ]
    if all(sampler.is_greedy for sampler in samplers):
        return likeliest.clone()
    return draw(logits, likeliest, torch.tensor(rows, dtype=torch.float64))


class PendingTokens:
    """Tokens of a step on their way to the host, with log-probabilities if any row wants them."""

    def __init__(self, tokens: Tensor, logits: Tensor, samplers: Sequence[Sampler]) -> None:
        self._wanted = [sampler.options.top_logprobs for sampler in samplers]
        parts = [tokens]
        most = max((one for one in self._wanted if one is not None), default=None)
        if most is not None:
            every = logits.float().log_softmax(-1)
            values, indices = every.topk(min(most, every.shape[1]), dim=-1)
            parts += [every.gather(1, tokens[:, None]), values, indices]
        self._parts = [_to_host(part) for part in parts]
        self._event = None
        if tokens.device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[tuple[int, TokenLogprobs | None]]:
        """Wait for them."""
        if self._event is not None:
            self._event.synchronize()
        tokens, *rest = (part.tolist() for part in self._parts)
        if not rest:
            return [(token, None) for token in tokens]
        rows = zip(tokens, self._wanted, *rest, strict=True)
        return [(token, _logprobs(count, *numbers)) for token, count, *numbers in rows]


def _logprobs(
    count: int | None, own: list[float], values: list[float], indices: list[int]
) -> TokenLogprobs | None:
    if count is None:
        return None
    return TokenLogprobs(own[0], tuple(zip(indices, values, strict=True))[:count])


def _to_host(values: Tensor) -> Tensor:
    if values.device.type != "cuda":
        return values
    return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
