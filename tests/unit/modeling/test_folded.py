"""Folding leaves the function of a model as it is, and is refused where it can't."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from qtool.checkpoint.shards import Shards
from qtool.modeling.families import families as known_families
from qtool.modeling.foldable import fold_groups
from qtool.modeling.folded import fold_source
from qtool.modeling.load import load_original
from qtool.modeling.locate import Location
from qtool.modeling.source import ModelSource, open_source

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
