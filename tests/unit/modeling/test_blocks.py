"""The block walk must see what the whole model sees, in every family."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import qtool.modeling.adapters
from qtool import plugins
from qtool.base import ModelAdapter
from qtool.errors import ModelError
from qtool.modeling.blocks import BlockModel
from qtool.modeling.source import open_source

FAMILIES = [*plugins.names(qtool.modeling.adapters), "bloom", "stablelm", "gemma3_text"]


def tokens():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 96, shape, generator=generator) for shape in ((2, 20), (1, 33))]


@pytest.mark.parametrize("family", FAMILIES)
def test_walking_the_blocks_equals_the_whole_forward_pass(tiny, family):
    directory = tiny(family)
    source = open_source(str(directory))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    wanted = []
    model.get_submodule(source.adapter.blocks)[-1].register_forward_hook(
        lambda _module, _inputs, out: wanted.append(out[0] if isinstance(out, tuple) else out)
    )
    walked = BlockModel(source, "cpu")
    hidden = walked.capture(tokens())
    for index in range(source.num_blocks):
        block = walked.load(index)
        hidden = [block.run(x, batch) for batch, x in enumerate(hidden)]
    with torch.no_grad():
        for batch in tokens():
            model(batch)
    for seen, expected in zip(hidden, wanted, strict=True):
        torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_the_adapter_is_called_with_its_width(tiny, family):
    source = open_source(str(tiny(family)))
    walked = BlockModel(source, "cpu")
    hidden = walked.capture(tokens()[:1])
    block = walked.load(0)
    for group in source.adapter.linears:
        inputs = [block.inputs_of(name, hidden[0], 0) for name in group]
        width = source.weight_shape(f"{source.adapter.blocks}.0.{group[0]}").in_features
        assert inputs[0].shape == (40, width)
        for other in inputs[1:]:  # the adapter says that these share an input
            assert torch.equal(other, inputs[0])


def test_replaced_weight_is_used_and_the_copy_keeps_its_own(tiny):
    source = open_source(str(tiny("gpt2")))
    walked = BlockModel(source, "cpu")
    hidden = walked.capture(tokens()[:1])
    block = walked.load(0)
    kept = block.copy()
    before = block.run(hidden[0], 0)
    weight = source.read_weight("transformer.h.0.mlp.c_proj")
    block.set_weight("mlp.c_proj", torch.zeros_like(weight), transposed=True)
    assert not torch.equal(block.run(hidden[0], 0), before)
    assert torch.equal(kept.run(hidden[0], 0), before)
    block.set_weight("mlp.c_proj", weight, transposed=True)
    assert torch.equal(block.run(hidden[0], 0), before)


def test_linear_that_is_never_called_is_an_error(tiny, monkeypatch):
    source = open_source(str(tiny("llama")))
    walked = BlockModel(source, "cpu")
    hidden = walked.capture(tokens()[:1])
    block = walked.load(0)
    monkeypatch.setattr(block, "run", lambda x, _batch: x)
    with pytest.raises(ModelError, match="never called"):
        block.inputs_of("mlp.down_proj", hidden[0], 0)


def with_residual():
    """Return the families whose adapter says what is added to the residual stream."""
    return [f for f in plugins.names(qtool.modeling.adapters) if adapter(f).residual is not None]


def first_block(directory):
    """Return the first block of a model and what it is called with."""
    walked = BlockModel(open_source(str(directory)), "cpu")
    hidden = walked.capture(tokens()[:1])[0]
    return walked.load(0), hidden


def adapter(family):
    return plugins.load(qtool.modeling.adapters, family, "ADAPTER", ModelAdapter)


@pytest.mark.parametrize("family", with_residual())
def test_residual_linears_are_all_that_a_block_adds_to_its_input(tiny, family):
    block, hidden = first_block(tiny(family))
    assert not torch.equal(block.run(hidden, 0), hidden)
    for linear in adapter(family).residual:
        for parameter in block._module.get_submodule(linear).parameters():
            parameter.zero_()
    torch.testing.assert_close(block.run(hidden, 0), hidden)


@pytest.mark.parametrize("family", with_residual())
def test_output_of_the_last_linear_is_added_to_what_around_returns(tiny, family):
    block, hidden = first_block(tiny(family))
    linear = adapter(family).residual[1]
    inputs, residual = block.around(linear, hidden, 0)
    torch.testing.assert_close(inputs, block.inputs_of(linear, hidden, 0))
    module = block._module.get_submodule(linear)
    torch.testing.assert_close(residual + module(inputs), block.run(hidden, 0).flatten(0, -2))


def test_family_that_normalizes_after_the_sum_has_no_residual_stream(tiny, tmp_path):
    directory = Path(shutil.copytree(tiny("opt"), tmp_path / "opt"))
    assert open_source(str(directory)).residual == ("self_attn.out_proj", "fc2")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "do_layer_norm_before": False}))
    assert open_source(str(directory)).residual is None
