"""Divergences that gradients foretell, against those that are there."""

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from qtool.errors import MethodError
from qtool.training.foretold import foretold_divergences
from tests import families
from tests.helpers import normal

TOKENS = torch.randint(3, 96, (512, 8), generator=torch.Generator().manual_seed(0))
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "opt": "model.decoder.layers"}


def model(family: str, *, tied: bool = False):
    built = families.build(family, tied=tied).double().eval()
    for parameter in built.parameters():  # larger than at birth, so that weights matter
        if parameter.dim() > 1:
            parameter.data *= 4
    return built


def foretold(
    family: str,
    errors: Mapping[str, Callable[[], Sequence[Tensor]]],
    *,
    size: int = 128,
    tied_head: str | None = None,
    device: str = "cpu",
) -> dict[str, Tensor]:
    return foretold_divergences(
        model(family, tied=tied_head is not None).to(device),
        BLOCKS[family],
        errors,
        TOKENS.split(size),
        torch.Generator(device).manual_seed(1),
        tied_head=tied_head,
    )


@torch.no_grad()
def measured(family: str, name: str, error: Tensor, *, tied: bool = False) -> float:
    """Return KL(original || with an error of one weight), nats per token."""
    original = model(family, tied=tied)
    before = original(TOKENS, use_cache=False).logits.log_softmax(-1)
    weight = original.get_submodule(name).weight
    weight += (error.T if weight.shape != error.shape else error).double()
    after = original(TOKENS, use_cache=False).logits.log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.0.self_attn.k_proj"),
        ("llama", "model.layers.1.mlp.down_proj"),
        ("llama", "model.embed_tokens"),
        ("llama", "lm_head"),
        ("gpt2", "transformer.h.0.mlp.c_fc"),
        ("opt", "model.decoder.layers.0.fc1"),
    ],
)
def test_they_are_the_divergences(family, name):
    shape = model(family).get_submodule(name).weight.shape
    shape = shape[::-1] if name.startswith("transformer.h") else shape
    small = [scale * normal(*shape, seed=seed) for seed, scale in ((0, 1e-3), (1, 2e-3))]
    found = foretold(family, {name: lambda: small})[name]
    for value, error in zip(found.tolist(), small, strict=True):
        assert value == pytest.approx(measured(family, name, error), rel=0.2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj", "model.embed_tokens"])
def test_they_are_the_divergences_on_a_card_too(name):
    error = 1e-3 * normal(*model("llama").get_submodule(name).weight.shape)
    found = foretold("llama", {name: lambda: [error.cuda()]}, device="cuda")[name]
    assert found.device.type == "cpu"
    assert float(found) == pytest.approx(measured("llama", name, error), rel=0.2)


def test_a_tied_head_has_the_errors_of_the_embedding():
    name, error = "model.embed_tokens", 1e-3 * normal(96, 64)
    both = foretold("llama", {name: lambda: [error]}, tied_head="lm_head")[name]
    assert float(both) == pytest.approx(measured("llama", name, error, tied=True), rel=0.2)


def test_batches_change_nothing():
    error = {"model.layers.1.mlp.up_proj": lambda: [normal(96, 64)]}
    one, many = (foretold("llama", error, size=size) for size in (512, 32))
    assert float(*one.values()) == pytest.approx(float(*many.values()), rel=0.3)


def test_a_layer_that_sees_nothing_is_named():
    original = model("llama")
    original.add_module("unused", torch.nn.Linear(4, 4))
    errors = {"unused": lambda: [torch.ones(4, 4)]}
    with pytest.raises(MethodError, match="unused gets no gradients"):
        foretold_divergences(
            original, "model.layers", errors, TOKENS[:2].split(1), torch.Generator()
        )
