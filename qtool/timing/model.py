"""Time prefill and decoding of a loaded model, by what `generate` uses."""

from dataclasses import dataclass
from functools import partial

import torch

from qtool.data.windows import positions_of
from qtool.modeling.load import LoadedModel
from qtool.timing.machine import Clock
from qtool.timing.runs import runs_of
from qtool.timing.timing import time_tokens


@dataclass(frozen=True, slots=True)
class SpeedResult:
    """Tokens per second at batch 1; medians over the repeats."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prompt_tokens: int
    decode_tokens: int
    repeats: int
    backends: tuple[str, ...]
    """Backends that ran the quantized layers; empty for an unquantized model."""
    threads: int


@torch.inference_mode()
def time_model(
    model: LoadedModel, *, prompt_tokens: int = 512, decode_tokens: int = 32, repeats: int = 5
) -> SpeedResult:
    """Time one prompt and greedy decoding after it, token by token with a key-value cache.

    The first repeat warms up and isn't counted. A model of few positions is given fewer tokens.
    """
    vocabulary = model.model.config.get_text_config().vocab_size
    positions = positions_of(model.model.config)
    if positions is not None and prompt_tokens + decode_tokens > positions:
        prompt_tokens = min(prompt_tokens, max(1, positions // 2))
        decode_tokens = max(1, min(decode_tokens, positions - prompt_tokens))
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=generator).to(model.device)

    runs = runs_of(model, decode_tokens, room=prompt_tokens + decode_tokens)
    prefill, now = partial(runs.prefill, prompt), Clock(model.device).seconds
    prompt_seconds, decode_seconds = time_tokens(prefill, runs.decode, now, repeats)
    backends = {
        module.backend.name
        for module in model.model.modules()
        if getattr(module, "entry", None) is not None and module.backend is not None
    }
    return SpeedResult(
        prefill_tokens_per_second=prompt_tokens / prompt_seconds,
        decode_tokens_per_second=decode_tokens / decode_seconds,
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        repeats=repeats,
        backends=tuple(sorted(backends)),
        threads=torch.get_num_threads(),
    )
