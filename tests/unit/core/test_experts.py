"""Experts apart: names, and the same outputs as fused."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.core.experts import (
    ExpertName,
    beside_experts,
    chosen,
    expert_name,
    is_fused,
    separate_experts,
    separated,
)
from tests import mixtures

transformers = pytest.importorskip("transformers", minversion="5.0")

WORDS = st.text(st.characters(codec="ascii", exclude_characters=".[]\n"), min_size=1, max_size=8)


@given(st.lists(WORDS, max_size=3), WORDS, st.integers(0, 10**6))
def test_a_name_is_read_as_it_is_written(modules, weight, number):
    name = ExpertName(".".join(modules), weight, number)
    assert expert_name(str(name)) == name
    assert expert_name(f"{name}.codes") is None
    assert expert_name(name.fused) is None


@given(st.integers(1, 6), st.data())
def test_each_slot_is_yielded_once_with_its_expert(num_experts, data):
    rows = st.lists(st.integers(0, num_experts), min_size=2, max_size=2)
    index = torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=9)))
    found = dict(chosen(index, num_experts))
    flat = index.flatten()
    assert all(bool((flat[slots] == number).all()) for number, slots in found.items())
    together = torch.cat([*found.values(), (flat == num_experts).nonzero().squeeze(-1)])
    assert together.sort().values.tolist() == list(range(len(flat)))  # the last number means none


@pytest.mark.parametrize("name", mixtures.MIXTURES)
@torch.no_grad()
def test_outputs_are_those_of_the_fused_experts(name):
    model, tokens = mixtures.build(name).float(), torch.arange(3, 23).view(2, 10)
    apart = separated(model)
    assert apart is not model and any(map(is_fused, model.modules()))
    assert not any(map(is_fused, apart.modules()))
    assert separated(apart) is apart
    expected = model(tokens, use_cache=False).logits
    torch.testing.assert_close(apart(tokens, use_cache=False).logits, expected)
    moved = copy.deepcopy(apart).to(torch.float64)
    torch.testing.assert_close(
        moved(tokens, use_cache=False).logits.float(), expected, rtol=1e-3, atol=1e-4
    )


def test_weights_stay_where_they_are_until_they_are_replaced():
    model = mixtures.build("gpt_oss")  # whose weights are transposed
    experts = model.model.layers[0].mlp.experts
    places = experts.down_proj.untyped_storage().data_ptr()
    assert "model.layers.0.mlp.experts" in separate_experts(model)
    linear = model.get_submodule("model.layers.0.mlp.experts.down_proj[2]")
    assert linear.weight.untyped_storage().data_ptr() == places
    assert tuple(linear.weight.shape) == (64, 32)


def test_what_stands_beside_experts_is_found():
    blocks = separated(mixtures.build("qwen2_moe")).get_submodule("model.layers")
    assert beside_experts(blocks.get_submodule("0")) == []
    shared = [f"mlp.shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    assert beside_experts(blocks.get_submodule("1")) == [*shared, "mlp.shared_expert_gate"]
