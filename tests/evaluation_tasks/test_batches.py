"""How many requests are answered at once."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from transformers import AutoConfig, AutoModelForCausalLM

from qtool.evaluation.lm_eval import batches
from qtool.evaluation.lm_eval.batches import MOST_ON_CPU, MOST_WRITTEN, batches_by_length
from qtool.evaluation.lm_eval.options import TaskOptions
from qtool.evaluation.lm_eval.task_model import TaskModel
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.runtime.card_memory import cache_bytes
from tests import families
from tests.evaluation_tasks.conftest import save


def chunks(lengths, size_of):
    """Cut as lm-eval's collator does: it asks at every position, and ends a batch at equality."""
    found, batch = [], []
    for position, length in enumerate(lengths):
        batch.append(length)
        if len(batch) == size_of(position, lengths):
            found.append(batch)
            batch = []
    return [*found, batch] if batch else found


@given(st.lists(st.integers(1, 5000), max_size=300), st.integers(1, 30000))
def test_batches_are_as_large_as_their_tokens_allow(lengths, tokens):
    lengths = sorted(lengths, reverse=True)
    size_of = batches_by_length(64, tokens, lambda length: length)
    for _ in range(2):  # begins anew with each list
        found = chunks(lengths, size_of)
        assert [length for batch in found for length in batch] == lengths
        for batch in found:
            assert len(batch) <= 64
            assert len(batch) == 1 or len(batch) * batch[0] <= tokens
        for batch in found[:-1]:
            assert len(batch) == 64 or (len(batch) + 1) * batch[0] > tokens


def test_logits_take_two_gibibytes_or_a_part_of_a_small_card():
    each = 2 * 49152
    assert batches.tokens_read_at_once(each, None) == 2**31 // each == 21845
    assert batches.tokens_read_at_once(each, 80 * 2**30) == 21845
    assert batches.tokens_read_at_once(each, 8 * 2**30) == 2**29 // each


def test_keys_and_values_take_a_part_of_the_card():
    llama = SimpleNamespace(
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, hidden_size=4096
    )
    each = cache_bytes(llama, torch.float16)
    assert each == 128 * 1024
    assert batches.written_at_once(each, 4096, None) == MOST_ON_CPU
    assert batches.written_at_once(each, 4096, 80 * 2**30) == MOST_WRITTEN
    assert batches.written_at_once(each, 4096, 24 * 2**30) == 6
    assert batches.written_at_once(each, 131072, 24 * 2**30) == 1
    assert cache_bytes(SimpleNamespace(**vars(llama), head_dim=64), torch.bfloat16) == (64 * 1024)
    with_all_heads = SimpleNamespace(
        num_hidden_layers=2, num_attention_heads=4, hidden_size=64, num_key_value_heads=None
    )
    assert cache_bytes(with_all_heads, torch.float32) == 2 * 2 * 64 * 4
    assert cache_bytes(SimpleNamespace(num_hidden_layers=2), torch.float16) == 0


VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
OTHERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "recurrent": ("mamba", {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2}),
    "with images": (
        "gemma3",
        {
            "text_config": {**families.DEFAULTS, "head_dim": 16},
            "vision_config": {**VISION, "num_attention_heads": 2, "image_size": 28},
        },
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_of_other_shapes_are_asked_too(evaluate, tmp_path, kind):
    family, values = OTHERS[kind]
    config = AutoConfig.for_model(family, **values, pad_token_id=0, eos_token_id=2)
    model = save(AutoModelForCausalLM.from_config(config), tmp_path / "model")
    options = {"limit": 2, "num_fewshot": 0, "max_length": 300}
    result = evaluate("arc_easy", "gsm8k", model=model, **options)
    assert result.model.failures == ()


def test_beams_take_memory_too(long_llama, monkeypatch):
    model = TaskModel(load_model(Location(long_llama), device="cpu"), TaskOptions(tasks=()))
    sizes: list[int] = []

    def written_at_once(size: int, *_rest: Any) -> int:
        sizes.append(size)
        return 1

    monkeypatch.setattr(batches, "written_at_once", written_at_once)
    for beams in (1, 3):
        arguments = ("w3 w4", {"until": ["w9"], "max_gen_toks": 1, "num_beams": beams})
        model.generate_until([Instance("generate_until", {}, arguments, 0)])
    assert sizes[1] == 3 * sizes[0] > 0
