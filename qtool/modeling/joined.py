"""Tensors that transformers makes of several stored ones, or of one in another layout."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qtool.base import CausalModel
from qtool.checkpoint.shards import Shards
from qtool.modeling.config import transformers_failures
from qtool.modeling.skeleton import transforms_of


@dataclass(frozen=True, slots=True)
class Joined:
    """A tensor of the model that loading computes."""

    name: str
    """Of the first tensor that its rule makes."""
    rule: Any
    """transformers' converter."""
    pieces: tuple[tuple[str, str], ...]
    """Of each stored tensor the pattern that it matches, and its name."""
    model: CausalModel
    """The empty model, whose shapes some rules ask for."""

    def read(self, shards: Shards, name: str) -> Tensor:
        """Return the tensor of that name, by transformers' own arithmetic.

        Raises:
            CheckpointError: a piece can't be read.
            ModelError: transformers can't join them.
        """
        rule = deepcopy(self.rule)
        for pattern, stored in self.pieces:
            rule.add_tensor(self.name, stored, pattern, shards.read(stored))
        with transformers_failures(f"transformers can't make {name} of what is stored"):
            made = rule.convert(self.name, model=self.model, config=self.model.config)
            value = made[name]
        tensor: Tensor = value[0] if isinstance(value, list) else value
        return tensor


def find_joined(model: CausalModel, shards: Shards) -> dict[str, Joined]:
    """Return what loading computes, by the model's names; transformers 4 has no rules for it."""
    try:
        from transformers import core_model_loading
    except ImportError:
        return {}
    renamings, converters = transforms_of(model)
    if not converters:
        return {}
    rules = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    wanted: Mapping[str, Any] = model.state_dict(keep_vars=True)
    pieces: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(shards.specs, key=_natural):
        renamed, pattern = core_model_loading.rename_source_key(
            name, renamings, converters, model.base_model_prefix, wanted
        )
        if pattern is not None and not (renamed not in wanted and name in wanted):
            pieces.setdefault(renamed, []).append((pattern, name))
    found = {}
    for first, parts in pieces.items():
        rule = rules[parts[0][0]]
        joined = Joined(first, rule, tuple(parts), model)
        for target in rule.target_patterns:
            found[first.replace(rule.target_patterns[0], target)] = joined
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort numbers in a name as numbers: transformers stacks experts in that order."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
