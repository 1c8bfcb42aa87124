"""What a weight of a model is, by the module that holds it: why one isn't quantized."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

FALCON = "FalconLinear"
"""The one class of transformers that says a linear's product in words of its own."""
TO_ENCODER = re.compile(r"(^|\.)(encoder_?attn|cross_?att(n|ention)|EncDecAttention)(\.|$)", re.I)
READ_BY_CODE = re.compile(
    r"(^|\.)(weights_proj|wg|classifier|feed_forward\.value|attention\.output)$"
)
"""Linears whose weight a model's code reads itself: of indexers, routers, and RWKV."""
FEWEST_DIMENSIONS = 2
"""Dimensions from which on a weight is worth a word."""
SCALED_TABLE = "ScaledWordEmbedding"
"""End of the names of classes whose rows are multiplied by a constant factor."""
READ_TABLES = ("gemma4",)
"""Families whose code takes rows out of the embedding's weight by itself."""
ROUTER = re.compile(r"Router|Gate$|Gating|TopK")
"""Classes of what chooses experts."""

RECURRENT = ("A_log", "D", "dt_bias", "time_decay", "slope_rate", "recurrent_param")
"""Parameters and buffers of what remembers by a recurrence: Mamba, gated delta rules, RWKV."""
SENSITIVE = re.compile(
    r"(out|o|x|dt|a|b|ba|f_a|f_b|g_a|g_b|beta|alpha)_proj|in_proj_(a|b|ba)|linear_out|output|out"
)
"""Linears of such a module through which an error stays in its state, or leaves it unscaled."""


def is_linear(module: nn.Module) -> bool:
    """Return whether a module multiplies by its weight (out_features, in_features), no more."""
    plain = type(module).forward is nn.Linear.forward
    return isinstance(module, nn.Linear) and (plain or type(module).__name__ == FALCON)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is GPT-2's linear, of a weight (in_features, out_features)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def linears_of(block: nn.Module, *, transposed: bool = False) -> list[str]:
    """Return the dotted names of a block's linears, but for those that its code looks into.

    Args:
        block: A decoder block, or a whole model.
        transposed: Of those that are GPT-2's.
    """
    wanted = is_conv1d if transposed else is_linear
    return [
        name
        for name, part in block.named_modules()
        if wanted(part) and not READ_BY_CODE.search(name) and not TO_ENCODER.search(name)
    ]


def is_table(module: nn.Module) -> bool:
    """Return whether a module gives rows of its weight, times a constant factor at most."""
    plain = type(module).forward is nn.Embedding.forward
    known = plain or type(module).__name__.endswith(SCALED_TABLE)
    return isinstance(module, nn.Embedding) and known and not module._modules


def is_convolution(module: nn.Module) -> bool:
    """Return whether a module is a convolution."""
    return isinstance(module, nn.modules.conv._ConvNd)


def is_recurrent(module: nn.Module) -> bool:
    """Return whether a module mixes tokens by a recurrence or a short convolution."""
    own = {*module._parameters, *module._buffers}
    return bool(own.intersection(RECURRENT)) or any(map(is_convolution, module.children()))


class PlainWeight(NamedTuple):
    """A weight that qtool doesn't quantize: no linear's."""

    why: str
    is_meant: bool
    """It stays in 16 bit by design; else qtool just can't do better."""


def plain_weights(model: nn.Module) -> dict[str, PlainWeight]:
    """Return what a model has of two dimensions and more beside linears and tables, by name.

    An embedding that does more than look up rows, such as to normalize them, is none; nor is one
    whose rows something else in the model reads.
    """
    linears = {*linears_of(model), *linears_of(model, transposed=True)}
    tables = _tables_of(model)
    computed = PlainWeight("a buffer, which isn't learned", is_meant=True)
    buffers = {
        name: computed
        for name, values in model.named_buffers()
        if values.dim() >= FEWEST_DIMENSIONS
    }
    return buffers | {
        f"{name}.{own}".lstrip("."): _why_plain(name, module, own, parameter.dim())
        for name, module in model.named_modules()
        for own, parameter in module._parameters.items()
        if parameter is not None
        and parameter.dim() >= FEWEST_DIMENSIONS
        and name not in linears
        and module not in tables
    }


def _tables_of(model: nn.Module) -> set[nn.Module]:
    """Return the embeddings that may be quantized, as far as their module goes."""
    found = {name: module for name, module in model.named_modules() if is_table(module)}
    main = getattr(model, "get_input_embeddings", lambda: None)()
    if getattr(getattr(model, "config", None), "model_type", None) in READ_TABLES:
        found = {name: module for name, module in found.items() if module is not main}
    own = next((f"{name}.weight" for name, module in found.items() if module is main), "")
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    shared = {
        name for pair in ties.items() for name in pair if own in pair or ties.get(own) in pair
    }
    if any(f"{name}.weight" in shared for name, module in found.items() if module is not main):
        return {*found.values()} - {main}
    return {*found.values()}


def _why_plain(name: str, module: nn.Module, own: str, dimensions: int) -> PlainWeight:
    kind = type(module).__name__
    chooses = ROUTER.search(kind) or name.rpartition(".")[2] in ("router", "gate")
    meant = (
        (is_convolution(module), "a convolution"),
        (is_recurrent(module), f"a parameter of a recurrence ({kind})"),
        (chooses, f"what chooses experts ({kind})"),
        ("shared_expert" in name, "shared experts, which every token passes"),
        (TO_ENCODER.search(name), "looks at an encoder, which isn't there"),
    )
    other = (
        ("expert" in kind.lower(), f"experts that qtool can't take apart ({kind})"),
        (dimensions > FEWEST_DIMENSIONS, f"of {dimensions} dimensions ({kind})"),
        (is_linear(module), "the model's own code reads it"),
        (is_table(module), "the model's own code, or another of its modules, reads its rows"),
        (isinstance(module, nn.Embedding), f"{kind} does more than look up its rows"),
        (True, f"{own} of {kind}, which qtool takes for no linear"),
    )
    found = next((why for holds, why in meant if holds), None)
    if found is not None:
        return PlainWeight(found, is_meant=True)
    return PlainWeight(next(why for holds, why in other if holds), is_meant=False)


def sensitive_linears(block: nn.Module) -> set[str]:
    """Return the linears of a block that stay in 16 bit unless a recipe names them.

    Measured by others: Unsloth's tables of Qwen3.5 (121 quantized files) find `ssm_out` the worst
    of all linears to quantize. The state that `x_proj`, `dt_proj` and their like make is summed
    over all tokens, so an error in them is summed as well.
    """
    return set(_sensitive(block))


def _sensitive(block: nn.Module) -> Iterator[str]:
    for name, module in block.named_modules():
        if is_recurrent(module):
            for child, part in module.named_children():
                if is_linear(part) and SENSITIVE.fullmatch(child):
                    yield f"{name}.{child}".lstrip(".")
