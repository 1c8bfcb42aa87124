"""Keep transformers 5 from joining the weights of single experts, at load and at save."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from qtool.core.experts import SeparateExperts


def without_experts(conversions: Sequence[Any], model: nn.Module) -> list[Any]:
    """Return the conversions of stored tensors but those that would take a single expert's.

    Args:
        conversions: transformers' `WeightConverter`s and `WeightRenaming`s of the model.
        model: With its experts apart, or without any.
    """
    names = _tensors_of_experts(model)
    return [one for one in conversions if not any(_takes(one, name) for name in names)]


def keep_names(model: nn.Module) -> None:
    """Let a model whose experts are apart be saved under the names that it has."""
    if _tensors_of_experts(model):
        object.__setattr__(model, "_weight_conversions", [])


def _takes(conversion: Any, name: str) -> bool:
    return conversion.rename_source_key(name)[0] != name


def _tensors_of_experts(model: nn.Module) -> list[str]:
    """Return the names of a tensor of each kind of expert's weight."""
    return [
        f"{name}.{weight}[0].weight"
        for name, module in model.named_modules()
        if isinstance(module, SeparateExperts)
        for weight in (module.first, module.last)
    ]
