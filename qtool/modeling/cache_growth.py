"""How much of each token a model's cache keeps, asked of the empty model itself.

A formula from the configuration is wrong where heads share keys, where these are of low rank, and
where layers keep a state or nothing: in a quarter of transformers' families.
"""

from pathlib import Path

import torch
from torch import Tensor

from qtool.base import CausalModel, ModelConfig
from qtool.errors import ModelError
from qtool.modeling.config import transformers_failures
from qtool.modeling.skeleton import empty_model

SHORTER, LONGER = 1, 2
"""Tokens that are run: what the second adds is what each adds, while no window is full."""


@torch.no_grad()
def cache_growth(config: ModelConfig, directory: Path) -> int | None:
    """Return how many numbers transformers' cache keeps of each token; none of them is computed.

    Args:
        config: Of the model, as transformers parses it.
        directory: For messages.

    Returns:
        Of keys and values of all layers; None: the model can't run without values.
    """
    try:
        with transformers_failures(f"{directory}: the empty model doesn't run"):
            model = empty_model(config, directory).to(torch.bfloat16).eval()
            model.config.pad_token_id = None  # some look for it among the tokens, to warn
            fewer, more = (_kept(model, count) for count in (SHORTER, LONGER))
    except ModelError:
        return None
    return more - fewer


def _kept(model: CausalModel, num_tokens: int) -> int:
    tokens = torch.zeros(1, num_tokens, dtype=torch.long, device="meta")
    cache = getattr(model(input_ids=tokens, use_cache=True), "past_key_values", None)
    kinds = ("keys", "values")
    found = [getattr(layer, kind, None) for layer in getattr(cache, "layers", ()) for kind in kinds]
    return sum(value.numel() for value in found if isinstance(value, Tensor))
