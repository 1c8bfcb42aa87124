"""An adapter for a family that has no file of its own: look at the modules of the empty model."""

from itertools import chain

from torch import nn

from qtool.base import CausalModel, ModelAdapter
from qtool.core.experts import beside_experts
from qtool.errors import ModelError

LIMITS = "docs/limitations.md says what kinds of models qtool takes."


def adapter_of(model: CausalModel, family: str) -> ModelAdapter:
    """Return the adapter of a model object; only names and types of its modules are looked at.

    Raises:
        ModelError: it has no single list of like blocks made of linears.
    """
    found = _largest_list(model)
    if found is None:
        raise ModelError(f"No list of decoder blocks in a {family!r} model. {_advice(family)}")
    blocks, module = found
    reason = _why_not(blocks, module, family)
    if reason is not None:
        raise ModelError(f"The blocks of a {family!r} model {reason}")
    names = {part: name for name, part in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding not in names or head not in names:
        raise ModelError(
            f"A {family!r} model has no plain token embedding and output head. {_advice(family)}"
        )
    return ModelAdapter(
        blocks=blocks,
        linears=tuple((name,) for name in dict.fromkeys(chain(*map(_linears, module)))),
        embedding=names[embedding],
        head=names[head],
        base_prefix=model.base_model_prefix,
        sensitive=tuple(dict.fromkeys(chain(*map(beside_experts, module)))),
    )


def _advice(family: str) -> str:
    return (
        f"Add qtool/modeling/families/{family}.py with the dotted names of its blocks and linears "
        "(docs/adding-a-model.md)."
    )


def _largest_list(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Return the list with the most parameters; lists inside it are parts of the blocks."""
    lists = [
        (name, part)
        for name, part in model.named_modules()
        if isinstance(part, nn.ModuleList) and len(part)
    ]
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()), default=None)


def _linears(block: nn.Module) -> list[str]:
    return [name for name, part in block.named_modules() if isinstance(part, nn.Linear)]


def _why_not(blocks: str, module: nn.ModuleList, family: str) -> str | None:
    """Return what qtool can't do with a list of blocks; None if nothing."""
    for number, block in enumerate(module):
        odd = _odd_parameter(block)
        if odd is not None:
            return f"hold {odd} in {blocks}.{number}, which qtool doesn't quantize. {LIMITS}"
    types = sorted({type(block).__name__ for block in module})
    kinds = {tuple(sorted(_linears(block))) for block in module}
    if len(types) > 1 or (len(kinds) > 1 and not any(map(beside_experts, module))):
        what = ", ".join(types) if len(types) > 1 else _difference(module)
        return f"aren't alike ({what}). {LIMITS}"
    if not _linears(module[0]):
        types = sorted({type(part).__name__ for part in module[0].modules() if part._parameters})
        return f"hold no linears ({', '.join(types)}). {_advice(family)}"
    return None


def _difference(module: nn.ModuleList) -> str:
    """Name a linear that one block has and another hasn't."""
    first, *rest = (set(_linears(block)) for block in module)
    number, other = next((n, o) for n, o in enumerate(rest, start=1) if o != first)
    return f"{min(first ^ other)} is in only one of blocks 0 and {number}"


def _odd_parameter(block: nn.Module) -> str | None:
    """Return what else than linears, norms and vectors a block is made of."""
    for name, part in block.named_modules():
        if isinstance(part, nn.ModuleList) and _linears(part) and "expert" not in name:
            return f"lists of linears ({name})"
        if isinstance(part, nn.modules.conv._ConvNd):
            return f"convolutions ({name})"
    for name, weight in block.named_parameters():
        if weight.dim() > 2 and "expert" in name:  # noqa: PLR2004
            return f"the weights of experts stacked in one tensor ({name})"
        if weight.dim() > 2:  # noqa: PLR2004
            return f"parameters of {weight.dim()} dimensions ({name}), no linears,"
    return None
