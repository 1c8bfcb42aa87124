"""What the loss of a model says of the outputs of its linears: one backward pass, no step.

Source: GuidedQuant (arXiv 2505.07004). A change e of a linear's output at a token changes the loss,
to second order, by about (g^T e)^2 / 2 with the gradient g there; channels taken for independent,
and g^2 averaged over a few groups of them, that is a weight per token and group of channels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qtool.base import CausalModel
from qtool.errors import MethodError

Edges = Mapping[str, tuple[int, ...]]
"""By linear, where its groups of output channels begin, and last how many channels it has."""


@torch.enable_grad()
def squared_gradients(
    model: CausalModel,
    blocks: str,
    edges: Edges,
    batches: Sequence[Tensor],
    report: Callable[[int], None],
) -> dict[str, Tensor]:
    """Return how much the loss of a model depends on the outputs of its linears.

    Blocks are run again on the way back, so their activations are in memory one block at a time.

    Args:
        model: Of transformers, in evaluation mode; its parameters won't require gradients any more.
        blocks: Dotted name of its list of blocks.
        edges: Groups of the linears' output channels, by dotted name.
        batches: Tokens, each (samples, length) int64.
        report: Is told how many batches are done.

    Returns:
        By linear, (tokens, groups) float32 on the CPU: the squared gradients of the sum of the
        cross entropies of all next tokens, averaged over the channels of each group.

    Raises:
        MethodError: a linear doesn't see every token once, or a gradient isn't finite.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in edges}
    with open_to_gradients(model, blocks) as stack:
        for name, ends in edges.items():
            note = partial(_note, ends=ends, found=found[name])
            stack.enter_context(model.get_submodule(name).register_forward_hook(note))
        for done, tokens in enumerate(batches, start=1):
            on_device = tokens.to(model.device)
            logits = model(on_device, use_cache=False).logits[:, :-1].flatten(0, 1)
            wanted = on_device[:, 1:].flatten()
            nn.functional.cross_entropy(logits.float(), wanted, reduction="sum").backward()
            report(done)
    num_tokens = sum(tokens.numel() for tokens in batches)
    return {name: _checked(name, parts, num_tokens) for name, parts in found.items()}


@contextmanager
def open_to_gradients(model: CausalModel, blocks: str) -> Iterator[ExitStack]:
    """Let gradients flow through a model to the outputs of its modules, none to its parameters.

    Blocks are run again on the way back. Hooks that a caller enters on what it is given go with it.
    """
    model.requires_grad_(requires_grad=False)
    with ExitStack() as stack:
        stack.enter_context(model.get_input_embeddings().register_forward_hook(_begin))
        for block in model.get_submodule(blocks):
            stack.enter_context(_checkpointed(block))
        yield stack


def _begin(_module: nn.Module, _arguments: object, output: Tensor) -> None:
    """Let gradients be taken of what follows: no parameter asks for them."""
    output.requires_grad_()


def _note(
    _module: nn.Module,
    _arguments: object,
    output: Tensor,
    *,
    ends: tuple[int, ...],
    found: list[Tensor],
) -> None:
    """Keep the squared gradient of an output when it comes."""
    sizes = [end - start for start, end in pairwise(ends)]

    def keep(gradient: Tensor) -> None:
        squared = gradient.flatten(0, -2).float().square()
        found.append(torch.stack([part.mean(1) for part in squared.split(sizes, 1)], 1).cpu())

    if output.requires_grad:
        output.register_hook(keep)


@contextmanager
def _checkpointed(block: nn.Module) -> Iterator[None]:
    """Run a block again on the way back; transformers does so only with dropout on."""
    forward = block.forward
    block.forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        del block.forward


def _checked(name: str, parts: list[Tensor], num_tokens: int) -> Tensor:
    seen = sum(map(len, parts))
    if seen != num_tokens:
        raise MethodError(
            f"{name} gets gradients for {seen} tokens, not for {num_tokens}. "
            "calibration.output_groups takes linears that see every token once; leave it out.",
            layer=name,
        )
    squared = torch.cat(parts)
    if not bool(torch.isfinite(squared).all()):
        raise MethodError(
            f"The gradients of the outputs of {name} hold NaN or infinity: the model is damaged, "
            "or leaves the range of its dtype. Leave out calibration.output_groups.",
            layer=name,
        )
    return squared
