"""How many requests are answered at once."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.evaluation import batches
from qtool.evaluation.batches import MOST_ON_CPU, MOST_WRITTEN, BatchByLength

pytest.importorskip("lm_eval")


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
    size_of = BatchByLength(64, tokens, lambda length: length)
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
    each = batches.cache_bytes(llama, torch.float16)
    assert each == 128 * 1024
    assert batches.written_at_once(each, 4096, None) == MOST_ON_CPU
    assert batches.written_at_once(each, 4096, 80 * 2**30) == MOST_WRITTEN
    assert batches.written_at_once(each, 4096, 24 * 2**30) == 6
    assert batches.written_at_once(each, 131072, 24 * 2**30) == 1
    assert batches.cache_bytes(SimpleNamespace(**vars(llama), head_dim=64), torch.bfloat16) == (
        64 * 1024
    )
    with_all_heads = SimpleNamespace(
        num_hidden_layers=2, num_attention_heads=4, hidden_size=64, num_key_value_heads=None
    )
    assert batches.cache_bytes(with_all_heads, torch.float32) == 2 * 2 * 64 * 4
