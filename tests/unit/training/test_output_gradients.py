"""Squared gradients of the outputs of linears, against gradients channel by channel."""

import pytest
import torch

from qtool.base import CausalModel
from qtool.errors import QtoolError
from qtool.training.output_gradients import squared_gradients
from tests import families

TOKENS = torch.randint(3, 96, (6, 20), generator=torch.Generator().manual_seed(0))
EDGES = {
    "model.layers.0.self_attn.k_proj": (0, 8, 20, 32),
    "model.layers.1.mlp.down_proj": (0, 64),
    "model.layers.0.mlp.up_proj": (0, 48, 96),
}


def model() -> CausalModel:
    return families.build("llama").double().eval()


def measured(original: CausalModel, size: int = 2) -> dict[str, torch.Tensor]:
    batches = TOKENS.split(size)
    return squared_gradients(original, "model.layers", EDGES, batches, lambda _: None)


def channel_by_channel(name: str, token: int, channels: range) -> float:
    """Return the mean squared gradient of what is added to a few channels at one token."""
    original = model()
    sample, place = divmod(token, TOKENS.shape[1])
    moved = {channel: torch.zeros((), dtype=torch.float64) for channel in channels}

    def move(_module, _inputs, output):
        output = output.clone()
        for channel, change in moved.items():
            output[sample, place, channel] += change.requires_grad_()
        return output

    with original.get_submodule(name).register_forward_hook(move):
        logits = original(TOKENS, use_cache=False).logits
    losses = [
        torch.nn.functional.cross_entropy(row[:-1], tokens[1:], reduction="sum")
        for row, tokens in zip(logits, TOKENS, strict=True)
    ]
    loss = torch.stack(losses).sum()
    found = [torch.autograd.grad(loss, change, retain_graph=True)[0] for change in moved.values()]
    return sum(float(gradient) ** 2 for gradient in found) / len(found)


@pytest.mark.parametrize(
    ("name", "token", "group"),
    [
        ("model.layers.0.self_attn.k_proj", 5, 0),
        ("model.layers.0.self_attn.k_proj", 47, 2),
        ("model.layers.0.mlp.up_proj", 33, 1),
        ("model.layers.1.mlp.down_proj", 118, 0),
    ],
)
def test_they_are_those_of_each_channel(name, token, group):
    edges = EDGES[name]
    expected = channel_by_channel(name, token, range(edges[group], edges[group + 1]))
    assert float(measured(model())[name][token, group]) == pytest.approx(expected, rel=1e-5)


def test_batches_only_cut_the_work():
    whole, parts = measured(model(), 6), measured(model(), 1)
    for name, edges in EDGES.items():
        assert whole[name].shape == (TOKENS.numel(), len(edges) - 1)
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=0)


def test_the_last_token_of_a_sample_has_no_next_one():
    found = measured(model())["model.layers.1.mlp.down_proj"].view(6, 20)
    assert bool((found[:, -1] == 0).all()) and bool((found[:, :-1] > 0).all())


def test_the_model_is_left_as_it_was():
    original = model()
    before = original(TOKENS[:1]).logits
    measured(original)
    assert torch.equal(original(TOKENS[:1]).logits, before)
    for block in original.model.layers:
        assert "forward" not in vars(block) and not block._forward_hooks


def test_linears_that_see_other_tokens_are_refused():
    original = model()
    layer = original.get_submodule("model.layers.0.mlp")
    whole = layer.forward
    layer.forward = lambda x: torch.cat([whole(x[:, :5]), whole(x[:, :-5] * 0)], 1).detach() + x
    with pytest.raises(QtoolError, match=r"up_proj gets gradients for 0 tokens.*leave it out"):
        measured(original)


def test_gradients_that_are_not_finite_are_refused():
    original = model()
    original.get_submodule("model.layers.1.mlp.down_proj").weight.data[0, 0] = torch.nan
    with pytest.raises(QtoolError, match="hold NaN or infinity"):
        measured(original)
