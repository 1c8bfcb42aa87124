"""An adapter for a family that has no file of its own: look at the modules of the empty model."""

from pathlib import Path

from qtool.base import ModelAdapter
from qtool.errors import ModelError

ADVICE = (
    "Add qtool/modeling/adapters/{family}.py with the dotted names of its blocks and linears "
    "(docs/adding-a-model.md)."
)


def find_adapter(directory: Path) -> ModelAdapter:
    """Build the model without weights, find its list of decoder blocks and their linears.

    Raises:
        ModelError: transformers doesn't know the model, or it has no single list of like blocks
            made of linears.
    """
    import torch  # slow imports
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers raises many unrelated types
        raise ModelError(
            f"{directory}: transformers can't build this model without remote code: {error}"
        ) from error
    return adapter_of(model, str(config.model_type))


def adapter_of(model: "torch.nn.Module", family: str) -> ModelAdapter:  # type: ignore[name-defined]  # noqa: F821
    """Return the adapter of a model object; only names and types of its modules are looked at."""
    from torch import nn

    advice = ADVICE.format(family=family)
    all_lists = [n for n, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(block) for block in module}) == 1
        and any(isinstance(part, nn.Linear) for part in module.modules())
        and not any(isinstance(part, nn.ModuleList) for part in list(module.modules())[1:])
    }
    nested = [name for name in lists if any(name.startswith(other + ".") for other in all_lists)]
    if nested:
        raise ModelError(
            f"The blocks of a {family!r} model hold lists of linears ({nested[0]}), such as "
            f"experts, which qtool doesn't quantize yet. {advice}"
        )
    if not lists:
        raise ModelError(
            f"No list of decoder blocks made of linears in a {family!r} model. {advice}"
        )
    blocks, module = max(lists.items(), key=lambda item: _size(item[1]))
    first = module[0]
    stacked = [name for name, weight in first.named_parameters() if weight.dim() > 2]  # noqa: PLR2004
    if stacked:
        raise ModelError(
            f"The blocks of a {family!r} model stack the weights of experts ({stacked[0]}), which "
            f"qtool doesn't quantize yet. {advice}"
        )
    linears = tuple((name,) for name, part in first.named_modules() if isinstance(part, nn.Linear))
    names = {part: name for name, part in model.named_modules()}
    return ModelAdapter(
        blocks=blocks,
        linears=linears,
        embedding=names[model.get_input_embeddings()],
        head=names[model.get_output_embeddings()],
        base_prefix=model.base_model_prefix,
    )


def _size(module: "torch.nn.Module") -> int:  # type: ignore[name-defined]  # noqa: F821
    return sum(weight.numel() for weight in module.parameters())
