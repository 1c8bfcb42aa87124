"""What is kept of a block's runs is what runs of it give, to the bit, in every family."""

import pytest
import torch

from qtool.modeling.families import families
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source
from qtool.walk.blocks import BlockModel
from qtool.walk.remembered import RememberingBlock, can_remember
from qtool.walk.replayed import ReplayingBlock
from tests.unit.walk.test_blocks import tokens


def opened(tiny, family):
    source = open_source(Location(tiny(family)))
    model = BlockModel(source, "cpu")
    return source, model, model.capture(tokens()[:2])


def shaken(source, name):
    weight = source.read_weight(f"{source.adapter.blocks}.0.{name}")
    return weight * (
        1 + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    )


def counted(module) -> list[int]:
    runs: list[int] = []
    module.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("family", families())
def test_original_says_the_same_by_one_run(tiny, family):
    source, model, hidden = opened(tiny, family)
    plain, firsts = model.load(0), [group[0] for group in source.adapter.linears]
    last = source.residual and source.residual[1]
    kept = RememberingBlock(model.load(0), firsts, last)
    runs = counted(kept.module)
    for batch, x in enumerate(hidden):
        for name in firsts:
            assert torch.equal(kept.inputs_of(name, x, batch), plain.inputs_of(name, x, batch))
        if last:
            expected = plain.around(last, x, batch)
            assert all(map(torch.equal, kept.around(last, x, batch), expected))
        assert torch.equal(kept.run(x, batch), plain.run(x, batch))
    assert len(runs) == len(hidden)


@pytest.mark.parametrize("family", families())
def test_block_that_is_quantized_linear_by_linear_says_the_same(tiny, family):
    source, model, hidden = opened(tiny, family)
    if source.residual is None:
        pytest.skip("no residual stream is looked at")
    every = [name for group in source.adapter.linears for name in group]
    plain, saving = model.load(0), ReplayingBlock(model.load(0), every, source.residual)
    of_attention, last = source.residual
    runs = counted(saving._module.get_submodule(of_attention))
    for group in source.adapter.linears:
        for batch, x in enumerate(hidden):
            if group[0] == last:
                pairs = zip(
                    saving.around(last, x, batch), plain.around(last, x, batch), strict=True
                )
                assert all(torch.equal(*pair) for pair in pairs)
            else:
                found = saving.inputs_of(group[0], x, batch)
                assert torch.equal(found, plain.inputs_of(group[0], x, batch))
        for name in group:
            for block in (plain, saving):
                block.set_weight(name, shaken(source, name), transposed=source.adapter.conv1d)
    outputs = [plain.run(x, batch) for batch, x in enumerate(hidden)]
    assert all(torch.equal(saving.run(x, batch), outputs[batch]) for batch, x in enumerate(hidden))
    # Once to measure the linear itself, up to it; once afterwards.
    assert len(runs) <= 2 * len(hidden)
    for name in every:  # whatever changes late is seen
        weight = source.read_weight(f"{source.adapter.blocks}.0.{name}")
        for block in (plain, saving):
            block.set_weight(name, weight, transposed=source.adapter.conv1d)
        assert torch.equal(saving.run(hidden[0], 0), plain.run(hidden[0], 0))


def test_who_takes_the_block_itself_may_change_it(tiny):
    source, model, hidden = opened(tiny, "llama")
    every = [name for group in source.adapter.linears for name in group]
    assert source.residual is not None
    saving = ReplayingBlock(model.load(0), every, source.residual)
    saving.around("mlp.down_proj", hidden[0], 0)
    with torch.no_grad():
        saving.module.get_submodule("self_attn.v_proj").get_parameter("weight").zero_()
    expected = saving.copy().run(hidden[0], 0)
    assert torch.equal(saving.run(hidden[0], 0), expected)


def test_only_what_is_little_is_kept():
    few, many = torch.zeros(1, 64, 8), torch.zeros(1, 1).expand(2**20, 64).unsqueeze(-1)
    assert can_remember([few], [8, 32])
    assert not can_remember([many], [8, 32])
    assert not can_remember([], [8])
