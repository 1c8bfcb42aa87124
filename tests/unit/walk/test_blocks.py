"""The block walk must see what the whole model sees, in every family."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from qtool.errors import ModelError
from qtool.modeling.families import families, load_family
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source
from qtool.walk.blocks import BlockModel

FAMILIES = [*families(), "bloom", "stablelm", "gemma3_text"]
ODD_FAMILIES = ["codegen", "gemma4_text", "gpt_neo", "gptj", "mpt", "phi"]
"""Blocks that return tuples, that hold buffers, or whose other arguments differ by batch."""
SHAPES = ((2, 20), (1, 33), (2, 20))


def tokens():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 96, shape, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize("family", [*FAMILIES, *ODD_FAMILIES])
def test_walking_the_blocks_equals_the_whole_forward_pass(tiny, family):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")
    directory = tiny(family)
    source = open_source(Location(directory))
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
    source = open_source(Location(tiny(family)))
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
    source = open_source(Location(tiny("gpt2")))
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
    source = open_source(Location(tiny("llama")))
    walked = BlockModel(source, "cpu")
    hidden = walked.capture(tokens()[:1])
    block = walked.load(0)
    monkeypatch.setattr(block, "output", lambda x, _call: x)
    with pytest.raises(ModelError, match="never called"):
        block.inputs_of("mlp.down_proj", hidden[0], 0)


def with_residual():
    """Return the families whose adapter says what is added to the residual stream."""
    return [f for f in families() if load_family(f).residual is not None]


def first_block(directory):
    """Return the first block of a model and what it is called with."""
    walked = BlockModel(open_source(Location(directory)), "cpu")
    hidden = walked.capture(tokens()[:1])[0]
    return walked.load(0), hidden


@pytest.mark.parametrize("family", with_residual())
def test_residual_linears_are_all_that_a_block_adds_to_its_input(tiny, family):
    block, hidden = first_block(tiny(family))
    assert not torch.equal(block.run(hidden, 0), hidden)
    for linear in load_family(family).residual or ():
        for parameter in block._module.get_submodule(linear).parameters():
            parameter.zero_()
    torch.testing.assert_close(block.run(hidden, 0), hidden)


@pytest.mark.parametrize("family", with_residual())
def test_output_of_the_last_linear_is_added_to_what_around_returns(tiny, family):
    block, hidden = first_block(tiny(family))
    _, linear = load_family(family).residual or ("", "")
    inputs, residual = block.around(linear, hidden, 0)
    torch.testing.assert_close(inputs, block.inputs_of(linear, hidden, 0))
    module = block._module.get_submodule(linear)
    torch.testing.assert_close(residual + module(inputs), block.run(hidden, 0).flatten(0, -2))


def test_family_that_normalizes_after_the_sum_has_no_residual_stream(tiny, tmp_path):
    directory = Path(shutil.copytree(tiny("opt"), tmp_path / "opt"))
    assert open_source(Location(directory)).residual == ("self_attn.out_proj", "fc2")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "do_layer_norm_before": False}))
    assert open_source(Location(directory)).residual is None


def test_block_that_needs_more_of_the_model_is_one_line(tiny, monkeypatch):
    block, hidden = first_block(tiny("llama"))

    def needs_more(*_arguments, **_keywords):
        raise KeyError("states of\nan earlier layer")

    monkeypatch.setattr(block._module, "forward", needs_more)
    with pytest.raises(ModelError, match=r"model\.layers\.0 can't be run block by block.*KeyError"):
        block.run(hidden, 0)


def test_too_little_memory_is_not_taken_for_something_else(tiny, monkeypatch):
    block, hidden = first_block(tiny("llama"))

    def no_room(*_arguments, **_keywords):
        raise RuntimeError("can't allocate memory: you tried to allocate 5 bytes")

    monkeypatch.setattr(block._module, "forward", no_room)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        block.run(hidden, 0)


def test_capturing_leaves_nothing_filled(tiny):
    walked = BlockModel(open_source(Location(tiny("llama"))), "cpu")
    walked.capture(tokens()[:1])
    assert all(parameter.is_meta for parameter in walked._model.parameters())
    assert not any(buffer.is_meta for buffer in walked._model.buffers())
