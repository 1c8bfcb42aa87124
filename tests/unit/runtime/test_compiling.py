"""torch.compile and torch.export, of weights that have run before and of such that haven't."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from qtool.runtime.backends._choose import use_backend
from qtool.runtime.modules import QuantizedEmbedding, QuantizedLinear, TiedHead
from tests.helpers import normal
from tests.unit.runtime.test_modules import entry, filled

INDEX = torch.tensor([[0, 11, 5]])


class Model(nn.Module):
    """An embedding, two like blocks, and the embedding as the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, _ = filled(QuantizedEmbedding(entry((12, 40)), torch.float32))
        self.blocks = nn.ModuleList(
            filled(QuantizedLinear(entry((40, 40)), normal(40)), seed)[0] for seed in (1, 2)
        )
        for block in self.blocks:
            block.bias.data = normal(40)
        self.head = TiedHead(self.table)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        x = self.table(index)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


@pytest.fixture(params=["cold", "warm", "copied"])
def model(request):
    torch._dynamo.reset()
    made = Model()
    if request.param != "cold":
        made(INDEX)
    return copy.deepcopy(made) if request.param == "copied" else made


@torch.no_grad()
def test_one_graph_is_compiled_once_and_gives_the_same(model):
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    first = compiled(INDEX)
    assert torch.equal(compiled(INDEX), first)
    torch.testing.assert_close(first, model(INDEX), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@torch.no_grad()
def test_other_parts_are_used_after_they_were_loaded(model):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(INDEX)
    other = Model()
    filled(other.blocks[0], seed=7)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(compiled(INDEX), other(INDEX), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_blocks_that_have_run_share_one_graph():
    torch._dynamo.reset()
    model, counter = Model(), CompileCounter()
    expected = model(INDEX)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend=counter)
    torch.testing.assert_close(model(INDEX), expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["dense", "reference"])
@torch.no_grad()
def test_exported_program_has_the_parts_and_gives_the_same(backend, tmp_path):
    with use_backend(backend):
        model = Model()
    exported = torch.export.export(model, (INDEX,), strict=False)
    assert "table.bit_planes" in exported.state_dict
    torch.export.save(exported, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(again(INDEX), model(INDEX), rtol=1e-5, atol=1e-5)
