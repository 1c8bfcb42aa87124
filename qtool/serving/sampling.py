"""Take the next tokens of a batch from its logits, each by options of its own; no host waits.

A sampled token comes from one random number per step by the inverse of the cumulative distribution.
The host draws that number before it knows the logits, from the request's own seed: so neither the
device nor who else is in the batch changes what a seed gives, but for rounding of the logits.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from qtool.core.nucleus import sample_nucleus
from qtool.serving.tokens import SamplingOptions, TokenLogprobs


class Sampler:
    """Options of one sequence, and its random numbers."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self._random = random.Random(options.seed)  # not for secrets

    @property
    def is_greedy(self) -> bool:
        """Return whether the likeliest token is taken."""
        return self.options.temperature == 0

    def draw(self) -> float:
        """Return the next number in [0, 1)."""
        return 0.0 if self.is_greedy else self._random.random()


def next_tokens(logits: Tensor, likeliest: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Return the tokens (rows,) int64 that follow.

    Args:
        logits: (rows, vocab_size).
        likeliest: (rows,) int64, their maxima.
        samplers: Of each row; each draws a number.
    """
    draws = [sampler.draw() for sampler in samplers]
    greedy = [sampler.is_greedy for sampler in samplers]
    if all(greedy):
        return likeliest.clone()
    options = [sampler.options for sampler in samplers]
    rows = [
        (one.temperature or 1.0, one.top_p, draw, is_greedy)
        for one, draw, is_greedy in zip(options, draws, greedy, strict=True)
    ]
    numbers = torch.tensor(rows, dtype=torch.float64).to(logits.device, non_blocking=True)
    temperatures, top_p, drawn, likely = numbers.split(1, dim=1)
    nuclei = top_p if any(one.top_p < 1 for one in options) else None
    sampled = sample_nucleus(logits, likeliest, temperatures, nuclei, drawn)
    return torch.where(likely[:, 0] > 0, likeliest, sampled)


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
