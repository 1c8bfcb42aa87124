"""Folding leaves the function of a model as it is, and is refused where it can't."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from qtool.checkpoint.shards import Shards
from qtool.errors import ModelError
from qtool.modeling.families import families as known_families
from qtool.modeling.foldable import check_foldable, fold_groups, why_not_foldable
from qtool.modeling.folded import fold_source
from qtool.modeling.load import load_original, load_source
from qtool.modeling.locate import Location
from qtool.modeling.source import ModelSource, open_source
from tests import families

FAMILIES = known_families()
PROMPT = torch.arange(3, 43).unsqueeze(0)
PER_BLOCK = {"gpt2": 3, "gpt_neox": 3}  # GELU lets no factor through


@dataclass(frozen=True, slots=True)
class Doubled(Shards):
    """Stored tensors as if they were stored in float64."""

    def read(self, name: str) -> Tensor:
        return Shards.read(self, name).double()


def doubled(directory) -> ModelSource:
    source = open_source(Location(directory))
    specs = {name: replace(spec, dtype="F64") for name, spec in source.shards.specs.items()}
    return replace(source, shards=Doubled(specs))


def drawn(groups, seed: int = 0) -> dict[str, Tensor]:
    """Return factors from 1/10 to 10, alike where they must be."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for group in groups:
        exponents = 2 * torch.rand(int(group.channel.max()) + 1, generator=generator) - 1
        found[group.linears[0]] = (10**exponents)[group.channel]
    return found


def all_groups(source: ModelSource):
    return [group for block in range(source.num_blocks) for group in fold_groups(source, block)]


@torch.inference_mode()
def logits(model):
    return model(PROMPT, use_cache=False).logits


@torch.no_grad()
def filled(directory, source: ModelSource, dtype: torch.dtype):
    """Return the model with all that the source changes, nothing of it rounded."""
    model = load_original(directory, "cpu").to(dtype)
    for name in source.changed():
        model.get_parameter(name).copy_(source.read_exact(name))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_is_exact_in_float64(family, tiny, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # Gemma's norms
    source = doubled(tiny(family))
    groups = all_groups(source)
    assert len(groups) == PER_BLOCK.get(family, 4) * source.num_blocks
    folded = fold_source(source, groups, drawn(groups))
    before = logits(load_original(tiny(family), "cpu").double())
    after = logits(filled(tiny(family), folded, torch.float64))
    assert float((after - before).abs().max()) <= 1e-9 * float(before.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_in_float16_only_biases_are_rounded(family, tiny):
    """Factors of norms are those that their rounded weights stand for."""
    source = open_source(Location(tiny(family)))
    groups = all_groups(source)
    folded = fold_source(source, groups, drawn(groups))
    before = logits(load_original(tiny(family), "cpu").double())
    after = logits(filled(tiny(family), folded, torch.float64))
    has_biases = any(name.endswith("bias") for name in folded.changed())
    limit = 2e-3 if has_biases else 1e-6  # 2^-11 of each bias; 2^-24 of each weight
    assert float((after - before).norm()) <= limit * float(before.norm())


def test_what_is_folded_is_loaded_and_read(llama):
    source = open_source(Location(llama))
    groups = all_groups(source)
    folded = fold_source(source, groups, drawn(groups))
    model = load_source(folded, "cpu")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, folded.read_exact(name).float())
        assert folded.read(name).dtype == torch.float16
        changed = not torch.equal(parameter, source.read(name).float())
        assert changed == (name in folded.changed())
    assert source.changed() == ()
    torch.testing.assert_close(logits(model), logits(load_original(llama, "cpu")))


def test_weight_of_a_linear_is_multiplied_and_that_before_it_divided(llama):
    source = open_source(Location(llama))
    (group,) = [one for one in fold_groups(source, 0) if one.producer.endswith("up_proj")]
    factors = drawn([group])
    folded = fold_source(source, [group], factors)
    (down,), s = group.linears, factors[group.linears[0]]
    torch.testing.assert_close(folded.read_weight(down), source.read_weight(down) * s)
    up = source.read_weight(group.producer)
    torch.testing.assert_close(folded.read_weight(group.producer), up / s.unsqueeze(1))


def test_heads_that_share_values_share_factors(llama):
    source = open_source(Location(llama))  # four heads of queries, two of values, 16 wide
    (group,) = [one for one in fold_groups(source, 0) if one.producer.endswith("v_proj")]
    expected = torch.cat([torch.arange(16), torch.arange(16)])
    assert torch.equal(group.channel, torch.cat([expected, expected + 16]).view(2, 2, 16).flatten())
    unlike = {group.linears[0]: torch.linspace(1, 2, 64)}
    with pytest.raises(ModelError, match=r"o_proj: .* fewer channels of .*v_proj \(heads share"):
        fold_source(source, [group], unlike)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_factors_that_are_none_are_refused_and_the_layer_named(llama, bad):
    source = open_source(Location(llama))
    group = next(fold_groups(source, 1))
    factors = torch.ones(64)
    factors[5] = bad
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj: a factor isn't finite"):
        fold_source(source, [group], {group.linears[0]: factors})
    with pytest.raises(ModelError, match=r"q_proj: 3 factors were chosen for 64 inputs"):
        fold_source(source, [group], {group.linears[0]: torch.ones(3)})


def test_weight_of_a_norm_that_is_zero_or_would_leave_its_dtype_stays(llama):
    source = doubled(llama)
    group = next(fold_groups(source, 0))
    weight = torch.ones(64, dtype=torch.float16)
    weight[:3] = torch.tensor([0.0, 6e4, -1.0])
    name = f"{group.producer}.weight"
    patched = replace(source, shards=Patched(source.shards.specs, {name: weight}))
    factors = torch.full((64,), 0.5)
    factors[0] = 100.0
    folded = fold_source(patched, [group], {group.linears[0]: factors})
    assert folded.read_exact(name)[:3].tolist() == [0.0, 6e4, -2.0]
    assert folded.columns[group.linears[0]][:3].tolist() == [1.0, 1.0, 0.5]


@dataclass(frozen=True, slots=True)
class Patched(Shards):
    """Stored tensors, some of them others."""

    others: dict[str, Tensor]

    def read(self, name: str) -> Tensor:
        return self.others[name] if name in self.others else Shards.read(self, name)


def changed_family(family: str, directory, **changes):
    families.build(family, **changes).save_pretrained(directory)
    return open_source(Location(directory))


def test_a_function_that_lets_no_factor_through_is_named(tmp_path, tiny):
    gelu = changed_family("opt", tmp_path / "a", activation_function="gelu")
    reason = why_not_foldable(gelu, "model.decoder.layers.1.fc2")
    assert reason is not None
    assert reason.startswith("model.decoder.layers.1.fc2: its inputs come from")
    assert "through gelu, which" in reason
    with pytest.raises(ModelError, match=r"can't be folded\. .*fc2: .*gelu.*relu"):
        check_foldable(gelu, ["fc2"])
    check_foldable(gelu, [])
    check_foldable(open_source(Location(tiny("opt"))), ["fc2"])
    assert len(list(fold_groups(gelu, 0))) == 3


def test_norms_after_the_sum_are_no_producers(tmp_path):
    """As in OPT-350m: what they put out is the residual stream."""
    source = changed_family("opt", tmp_path, do_layer_norm_before=False)
    assert [group.linears for group in fold_groups(source, 0)] == [
        ("model.decoder.layers.0.self_attn.out_proj",),
        ("model.decoder.layers.0.fc2",),
    ]
    with pytest.raises(
        ModelError, match=r"fc1: its inputs, of .*final_layer_norm, are the residual"
    ):
        check_foldable(source, ["fc1"])


def test_norms_without_weights_are_no_producers(tmp_path):
    source = changed_family("opt", tmp_path, layer_norm_elementwise_affine=False)
    with pytest.raises(ModelError, match=r"q_proj: .*layer_norm, .* has no weight that could take"):
        check_foldable(source, ["self_attn.q_proj"])


def test_model_that_was_discovered_is_refused_with_a_sentence(tiny):
    source = open_source(Location(tiny("stablelm")))
    with pytest.raises(ModelError, match="nobody has said what makes its inputs in a 'stablelm'"):
        check_foldable(source, [])


def test_a_norm_of_two_groups_is_folded_for_both(llama):
    """Parallel parts of a block: all linears behind a norm have one factor."""
    source = open_source(Location(llama))
    first = source.adapter.producers[0]
    shared = (first, source.adapter.producers[1], first, source.adapter.producers[3])
    parallel = replace(source, adapter=replace(source.adapter, producers=shared))
    found = next(fold_groups(parallel, 0))
    inner = [name.removeprefix("model.layers.0.") for name in found.linears]
    assert inner == [*source.adapter.linears[0], *source.adapter.linears[2]]
