"""Graphs over fixed buffers draw what is drawn without them."""

import pytest
import torch

from qtool.serving import drawing
from qtool.serving.drawing import TokenDrawer
from qtool.serving.sampling import draw_tokens

VOCABULARY, SLOTS = 1003, 5


class Replayed:
    """Stands for a graph: does again what was recorded."""

    def __init__(self, run):
        self.replay = run


@pytest.fixture(params=["stand-in", pytest.param("card", marks=pytest.mark.gpu)])
def drawer(request, monkeypatch):
    if request.param == "card":
        return TokenDrawer(SLOTS, torch.device("cuda", 0))
    monkeypatch.setattr(drawing, "warm_up", lambda run, _: run())
    monkeypatch.setattr(drawing, "recorded", lambda run, *_: (Replayed(run), run()))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    made = TokenDrawer(SLOTS, torch.device("cpu"))
    made.on_card = True
    return made


def inputs(rows, seed, device, dtype=torch.float16):
    """Return logits, the likeliest, and options: every third row takes the likeliest."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, VOCABULARY, generator=generator) * 3).to(dtype)
    options = torch.rand(rows, 4, generator=generator, dtype=torch.float64)
    options[:, 0] += 0.1
    options[:, 1] += 0.1 * (seed % 3)
    options[:, 3] = torch.arange(seed, seed + rows) % 3 == 0
    return logits.to(device), logits.argmax(-1).to(device), options


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@torch.no_grad()
def test_tokens_are_those_without_graphs_however_many_rows_there_are(drawer, dtype):
    device, kept = drawer._device, []
    for seed, rows in enumerate([1, 3, 5, 2, 4, 1, 5, 5]):
        logits, likeliest, options = inputs(rows, seed, device, dtype)
        expected = draw_tokens(logits, likeliest, options)
        kept.append((drawer(logits, likeliest, options), expected))
        likely = options[:, 3] > 0
        assert torch.equal(kept[-1][0].cpu()[likely], likeliest.cpu()[likely])
    assert drawer.on_card
    for got, expected in kept:  # later replays left them as they were
        assert torch.equal(got, expected)
    assert any(bool((got != 0).any()) for got, _ in kept)


@torch.no_grad()
def test_where_nothing_can_be_recorded_it_draws_without(drawer, monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(drawing, "recorded", fails)
    for seed in range(2):
        arguments = inputs(3, seed, drawer._device)
        assert torch.equal(drawer(*arguments), draw_tokens(*arguments))
    assert not drawer.on_card
    assert caplog.text.count("without a CUDA graph") == 1


@pytest.mark.gpu
@torch.no_grad()
def test_drawn_on_a_card_it_is_what_the_host_draws():
    drawer = TokenDrawer(16, torch.device("cuda", 0))
    for seed in range(20):
        logits, likeliest, options = inputs(1 + seed % 16, seed, "cpu")
        expected = draw_tokens(logits, likeliest, options)
        got = drawer(logits.cuda(), likeliest.cuda(), options).cpu()
        assert (got != expected).sum() <= 1  # exponentials differ in their last bit
