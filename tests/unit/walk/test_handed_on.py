"""Models whose later blocks take keys and values of earlier ones: Gemma 3n, Gemma 4."""

import pytest
import torch
from transformers import AutoModelForCausalLM, cache_utils

from qtool.base import Env
from qtool.core.parts import Parts
from qtool.data.calibration import CalibrationSet
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source
from qtool.recipe.calibration import CalibrationSection
from qtool.walk.blocks import BlockModel
from qtool.walk.filled_block import IN_BATCHES
from qtool.walk.solved import SolvedLinear
from qtool.walk.walk import Walk
from tests import tiny

pytestmark = pytest.mark.skipif(
    not hasattr(cache_utils, "KVSharingDict"),
    reason="this version of transformers shares keys and values otherwise",
)
KINDS = ["sliding_attention", "full_attention"] * 2
TOKENS = torch.randint(3, 96, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["gemma3n_text", "gemma4_text"])
def source(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    model = tiny.build(
        request.param, num_hidden_layers=4, num_kv_shared_layers=2, layer_types=KINDS
    )
    model.save_pretrained(directory)
    return open_source(Location(directory))


def outputs(source, changed=None):
    """Return what the last block of the whole model puts out, and what goes into it."""
    model = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32).eval()
    for name, weight in (changed or {}).items():
        model.get_submodule(name).weight.data.copy_(weight)
    seen = []
    last = model.get_submodule(source.adapter.blocks)[-1]
    last.register_forward_hook(lambda _, inputs, out: seen.extend([inputs[0], out]))
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    return seen


def test_the_original_never_sees_keys_and_values_of_the_quantized_model(source):
    layers = {name: source.weight_shape(name) for name in source.block_linears()}
    changed = {name: 1.5 * source.read_weight(name) for name in layers}
    samples = CalibrationSet(tuple(TOKENS), {"dataset": "random"})
    section = CalibrationSection(holdout=0.3)
    walk = Walk(source, layers, samples, section, Env(device="cpu"))
    for name in layers:
        walk.statistics(name)
        walk.put(name, SolvedLinear(changed.__getitem__(name).clone, None))
    visit = walk.visit(3)
    for block, stream, weights in (
        (visit.original, visit.streams.original, None),
        (visit.quantized, visit.streams.quantized, changed),
    ):
        wanted_input, wanted = outputs(source, weights)
        torch.testing.assert_close(torch.cat([*stream], -3), wanted_input)
        found = torch.cat([block.run(x, batch) for batch, x in enumerate(stream)], -3)
        torch.testing.assert_close(found, wanted)


def test_memory_that_is_full_leaves_keys_and_values_of_all_samples(source):
    parts = Parts(lambda _: None)
    parts.begin_with(IN_BATCHES, 2)
    walked = BlockModel(source, "cpu", parts=parts)
    (hidden,) = walked.capture([TOKENS])
    for index in range(4):
        hidden = walked.load(index).run(hidden, 0)
    torch.testing.assert_close(hidden, outputs(source)[1])
