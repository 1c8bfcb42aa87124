"""An adapter for a family that has no file of its own: look at the modules of the empty model."""

from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import chain

from torch import nn

from qtool.base import CausalModel, ModelAdapter
from qtool.core.experts import beside_experts
from qtool.errors import ModelError
from qtool.modeling.families import families, load_family
from qtool.modeling.kinds_of_weights import is_linear, linears_of, sensitive_linears

NEXT = 0.1
"""A list of more than this share of the largest one's parameters is one to be walked, too."""
LIMITS = "docs/limitations.md says what kinds of models qtool takes."


def known_adapter(model: CausalModel, family: str) -> ModelAdapter:
    """Return the adapter of a family's file, or that of a model object, as `adapter_of`."""
    return load_family(family) if family in families() else adapter_of(model, family)


def adapter_of(model: CausalModel, family: str) -> ModelAdapter:
    """Return the adapter of a model object; only names and types of its modules are looked at.

    Blocks may differ, as those of hybrids do: `linears` holds what any of them has.

    Raises:
        ModelError: it has no list of blocks with linears.
    """
    names = {part: name for name, part in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding not in names or head not in names:
        raise ModelError(
            f"A {family!r} model has no plain token embedding and output head. {_advice(family)}"
        )
    found = _blocks(model, names[embedding])
    if found is None:
        raise ModelError(f"No list of decoder blocks in a {family!r} model. {_advice(family)}")
    blocks, module = found
    shared = [name for name in _tied(model) if name.startswith(blocks + ".")]
    if shared:
        raise ModelError(
            f"The blocks of a {family!r} model share weights ({shared[0]} and others), which qtool "
            f"doesn't do. {LIMITS}"
        )
    transposed = not any(map(is_linear, module.modules()))
    linears = in_order([linears_of(block, transposed=transposed) for block in module])
    if not linears:
        types = sorted({type(part).__name__ for part in module.modules() if part._parameters})
        raise ModelError(
            f"The blocks of a {family!r} model ({blocks}) hold no linears ({', '.join(types)}). "
            f"{LIMITS} {_advice(family)}"
        )
    sensitive = set().union(*map(sensitive_linears, module), *map(beside_experts, module))
    return ModelAdapter(
        blocks=blocks,
        linears=tuple((name,) for name in linears),
        embedding=names[embedding],
        head=names[head],
        base_prefix=model.base_model_prefix,
        conv1d=transposed,
        sensitive=tuple(name for name in linears if name in sensitive),
    )


def _tied(model: nn.Module) -> list[str]:
    """Return the parameters that are others by another name, as transformers 5 says."""
    return sorted(getattr(model, "all_tied_weights_keys", None) or ())


def _advice(family: str) -> str:
    return (
        f"Add qtool/modeling/families/{family}.py with the dotted names of its blocks and linears "
        "(docs/adding-a-model.md)."
    )


def _blocks(model: nn.Module, embedding: str) -> tuple[str, nn.ModuleList] | None:
    """Return the list with the most parameters of the part that the embedding belongs to.

    Of a multimodal model that is the text decoder. Lists that lie deeper are parts of the blocks,
    or of an encoder.
    """
    part = embedding
    while part:
        part = part.rpartition(".")[0]
        found = list(_lists(model, part))
        if found:
            depth = min(name.count(".") for name, _ in found)
            level = [item for item in found if item[0].count(".") == depth]
            return _only(sorted(level, key=lambda item: _size(item[1]), reverse=True))
    return None


def _only(found: list[tuple[str, nn.ModuleList]]) -> tuple[str, nn.ModuleList]:
    """Return the largest of some lists, if there is no other one about as large."""
    (blocks, module), *rest = found
    others = [
        name
        for name, other in rest
        if _size(other) > NEXT * _size(module) and not any(map(is_linear, other))
    ]
    if others:
        raise ModelError(
            f"The model has several lists of blocks ({', '.join([blocks, *others])}), of which "
            f"qtool would walk only one. {LIMITS}"
        )
    return blocks, module


def _lists(model: nn.Module, part: str) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, module in model.get_submodule(part).named_modules(prefix=part):
        if isinstance(module, nn.ModuleList) and len(module):
            yield name, module


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def in_order(lists: Sequence[Sequence[str]]) -> list[str]:
    """Return all names of some lists once, each after those that stand before it in any list.

    Where two lists contradict each other, in the order in which they occur.
    """
    order: TopologicalSorter[str] = TopologicalSorter()
    for names in lists:
        for index, name in enumerate(names):
            order.add(name, *names[max(index - 1, 0) : index])
    try:
        return list(order.static_order())
    except CycleError:
        return list(dict.fromkeys(chain(*lists)))
