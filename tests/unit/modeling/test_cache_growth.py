"""What a cache keeps of a token, asked of the empty model, against what a cache really keeps."""

from pathlib import Path

import pytest
import torch

from qtool.modeling.cache_growth import cache_growth
from tests import tiny

FAMILIES = [
    name
    for name in (
        *("llama", "gpt2", "gemma3_text", "falcon", "gpt_bigcode", "deepseek_v3", "lfm2"),
        *("qwen3_next", "jamba", "bamba", "granitemoehybrid", "mixtral", "mamba", "zamba2"),
    )
    if name in tiny.families()
]


def kept(model, num_tokens: int) -> int:
    """Return how many numbers a cache holds after so many tokens."""
    with torch.no_grad():
        made = model(input_ids=torch.arange(3, 3 + num_tokens)[None], use_cache=True)
    cache = getattr(made, "past_key_values", None)
    layers = getattr(cache, "layers", ())
    both = [getattr(layer, kind, None) for layer in layers for kind in ("keys", "values")]
    return sum(each.numel() for each in both if isinstance(each, torch.Tensor))


@pytest.mark.parametrize("family", FAMILIES)
def test_growth_is_what_a_cache_grows_by(family):
    model = tiny.build(family).float().eval()
    expected = kept(model, 9) - kept(model, 8)
    assert cache_growth(tiny.configuration(family), Path("model")) == expected


def test_a_model_that_asks_for_values_has_none(monkeypatch):
    def asking(_model, input_ids, **_more):
        return bool(input_ids.sum() > 0)

    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", asking)
    assert cache_growth(tiny.configuration("llama"), Path("model")) is None
