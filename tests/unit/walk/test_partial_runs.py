"""A model that begins at a later block says what it says from the start."""

import pytest
import torch
from torch import nn

from qtool.modeling.discover import adapter_of
from qtool.modeling.families import families, load_family
from qtool.modeling.load import load_original
from qtool.walk.partial_runs import PartialRuns
from tests.families import VOCABULARY

TOKENS = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(0))


def opened(tiny, family: str) -> tuple[PartialRuns, list[nn.Module]]:
    model = load_original(tiny(family), "cpu")
    adapter = load_family(family) if family in families() else adapter_of(model, family)
    return PartialRuns(model, adapter.blocks), list(model.get_submodule(adapter.blocks))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bloom", "gemma3_text", "qwen3"])
def test_logits_from_a_later_block_are_those_of_the_whole_model(tiny, family):
    runs, blocks = opened(tiny, family)
    hidden = runs.inputs(TOKENS)
    whole = runs.model(TOKENS, use_cache=False).logits
    assert torch.equal(runs.logits(TOKENS, 0, hidden), whole)
    for index in range(len(blocks) - 1):
        hidden = runs.output(TOKENS, index, hidden)
        assert torch.equal(runs.logits(TOKENS, index + 1, hidden), whole)
    assert list(runs.model.get_submodule(runs.blocks)) == blocks


def test_blocks_before_it_do_not_run(tiny):
    runs, blocks = opened(tiny, "llama")
    hidden = runs.inputs(TOKENS)
    ran = []
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    runs.logits(TOKENS, 1, hidden)
    assert ran == [1]


def test_what_goes_into_a_linear_is_seen_where_a_block_gets_something_else(tiny):
    runs, _ = opened(tiny, "llama")
    hidden = runs.inputs(TOKENS)
    name = "model.layers.1.self_attn.q_proj"
    seen = runs.inputs_of(name, TOKENS, 1, hidden)
    assert seen.shape == (TOKENS.numel(), 64)
    norm = runs.model.get_submodule("model.layers.1.input_layernorm")
    torch.testing.assert_close(seen, norm(hidden).flatten(0, -2))
