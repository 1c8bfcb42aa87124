"""What an error of one weight does to a model's predictions, foretold by gradients.

To second order, predictions that a small error moves diverge from the original ones by half its
quadratic form under their Fisher information, which is the second moment of the gradients of
log-probabilities of tokens that the model itself draws (Amari, Natural gradient works efficiently
in learning, 1998). Of an error E of a linear the gradient takes only G = sum_t g_t x_t^T, summed
over the tokens of a sample, with inputs x and gradients g of the outputs, so that

    KL per token = E[<G, E>^2] / (2 tokens per sample).

No direction is left out, errors of all tokens of a sample add up with their signs, and one pass
weighs any number of errors.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qtool.base import CausalModel
from qtool.core.autograd import AutogradContext
from qtool.core.experts import expert_name
from qtool.errors import MethodError
from qtool.training.output_gradients import open_to_gradients

Errors = Mapping[str, Callable[[], Sequence[Tensor]]]
"""By layer, what gives the errors of its weight that are to be weighed, each (out_features,
in_features) float32 on the model's device; called whenever a batch comes back to the layer."""
Report = Callable[[int], None]


@torch.enable_grad()
def foretold_divergences(  # noqa: PLR0913 - a model, what is weighed, and on what
    model: CausalModel,
    blocks: str,
    errors: Errors,
    batches: Sequence[Tensor],
    generator: torch.Generator,
    report: Report = lambda _done: None,
    *,
    tied_head: str | None = None,
) -> dict[str, Tensor]:
    """Return by how much predictions will diverge for errors of single weights.

    Args:
        model: Of transformers, in evaluation mode; its parameters won't require gradients any more.
        blocks: Dotted name of its list of blocks.
        errors: Of linears and of the embedding.
        batches: Tokens, each (samples, length) int64; more and shorter samples say more.
        generator: On the model's device; draws the next tokens.
        report: Is told how many batches are done.
        tied_head: A linear that has the embedding's weight and hence its errors.

    Returns:
        By layer, (errors,) float64 on the CPU: KL(original || with that error), in nats per token.

    Raises:
        MethodError: a layer doesn't see every token once, or a gradient isn't finite.
    """
    sums: dict[str, Tensor] = {}
    found = _Products()
    with open_to_gradients(model, blocks) as stack:
        for name, made in errors.items():
            for module, weigh in _users(model, name, tied_head):
                keep = partial(found.keep, name, made, weigh)
                stack.enter_context(module.register_forward_hook(partial(_watch, keep)))
        for done, tokens in enumerate(batches, start=1):
            found.begin(len(tokens))
            _pass_back(model, tokens.to(model.device), generator)
            for name, made in errors.items():
                squares = found.of(name, made).double().square().sum(1).cpu()
                sums[name] = sums[name] + squares if name in sums else squares
            report(done)
    num_tokens = sum(tokens.numel() for tokens in batches)
    return {name: _checked(name, total) / (2 * num_tokens) for name, total in sums.items()}


Weigh = Callable[[Sequence[Tensor], Tensor, Tensor], Tensor]
"""(errors, inputs, gradients of the outputs), the latter two by sample -> (errors, samples)."""


def _users(model: CausalModel, name: str, tied_head: str | None) -> list[tuple[nn.Module, Weigh]]:
    """Return the modules that use a weight, and how."""
    module, table = model.get_submodule(name), model.get_input_embeddings()
    if module is not table:
        return [(module, _of_linear)]
    scale = float(getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", 1.0)))
    heads = [] if tied_head is None else [(model.get_submodule(tied_head), _of_linear)]
    return [(table, partial(_of_rows, scale)), *heads]


def _pass_back(model: CausalModel, tokens: Tensor, generator: torch.Generator) -> None:
    """Draw a token after each, and take the gradients of their log-probabilities."""
    logits = model(tokens, use_cache=False).logits.flatten(0, 1).float()
    with torch.no_grad():
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()


class _Watch(torch.autograd.Function):
    """The identity, which shows the input of a module the gradient of its output.

    What it saves a checkpointed block drops and computes again, as all else.
    """

    @staticmethod
    def forward(ctx: AutogradContext, output: Tensor, inputs: Tensor, keep: Any) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(inputs)
        ctx.keep = keep
        is_table = not inputs.is_floating_point()
        return output.clone() if is_table else output.view_as(output)  # CTRL scales it in place

    @staticmethod
    def backward(ctx: AutogradContext, *gradients: Any) -> Any:  # noqa: ANN401
        ctx.keep(ctx.saved_tensors[0], gradients[0])
        return gradients[0], None, None


def _watch(
    keep: Callable[[Tensor, Tensor], None],
    _module: nn.Module,
    arguments: tuple[Tensor, ...],
    output: Tensor,
) -> Tensor:
    return _Watch.apply(output, arguments[0].detach(), keep)  # type: ignore[no-untyped-call]


class _Products:
    """<G, E> of each layer, error and sample of a batch."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}
        self._samples = 0

    def begin(self, samples: int) -> None:
        """Forget the last batch; the next has so many samples."""
        self._found.clear()
        self._samples = samples

    def keep(
        self,
        name: str,
        errors: Callable[[], Sequence[Tensor]],
        weigh: Weigh,
        inputs: Tensor,
        gradients: Tensor,
    ) -> None:
        """Add what a module has seen; some models give their linears all samples in one.

        An expert's tokens are those of any samples, and are taken for one: what is drawn for two
        samples is independent, so that the mean of the square is the same.
        """
        samples = self._samples if expert_name(name) is None else 1
        by_sample = gradients.float().reshape(samples, -1, gradients.shape[-1])
        features = inputs.shape[gradients.dim() - 1 :]  # none where the inputs are tokens
        inputs = inputs.reshape(*by_sample.shape[:2], *features)
        products = weigh(errors(), inputs, by_sample)
        self._found[name] = self._found[name] + products if name in self._found else products

    def of(self, name: str, errors: Callable[[], Sequence[Tensor]]) -> Tensor:
        """Return the products of a layer, (errors, samples) float32; 0 of an expert not chosen."""
        if name not in self._found:
            if expert_name(name) is not None:
                return torch.zeros(len(errors()), 1)
            raise MethodError(
                f"{name} gets no gradients: choosing takes layers that see every token. Give it an "
                "override with a scheme of its own.",
                layer=name,
            )
        return self._found[name]


def _of_linear(errors: Sequence[Tensor], inputs: Tensor, gradients: Tensor) -> Tensor:
    found = []
    for x, g in zip(inputs.float(), gradients, strict=True):  # a sample: G is as large as a weight
        outer = g.T @ x
        found.append(torch.stack([(outer * error).sum() for error in errors]))
    return torch.stack(found, 1)


def _of_rows(scale: float, errors: Sequence[Tensor], tokens: Tensor, gradients: Tensor) -> Tensor:
    return torch.stack([scale * (error[tokens] * gradients).sum((1, 2)) for error in errors])


def _checked(name: str, total: Tensor) -> Tensor:
    if not bool(torch.isfinite(total).all()):
        raise MethodError(
            f"The gradients of the outputs of {name} hold NaN or infinity: the model is damaged, "
            "or leaves the range of its dtype. Leave out choosing, and name the bits of each layer."
        )
    return total
