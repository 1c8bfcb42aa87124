"""All that a loaded checkpoint holds beside its weights is as in the original."""

import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qtool import pipeline
from qtool.modeling.locate import Location
from qtool.runtime.backends._choose import use_backend
from qtool.runtime.modules import QuantizedEmbedding, QuantizedLinear, QuantizedWeight, TiedHead
from tests import families, zoo
from tests.helpers import dequantized, recipe

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

TABLE = {"method": "rtn", "scheme": {"num_bits": 8, "group_size": 32}}
PROMPT = torch.arange(3, 23).unsqueeze(0)


def load(directory):
    """Load a model whose products are torch's: what is compared is what was loaded."""
    from transformers import AutoModelForCausalLM

    zoo.poison_free_memory()
    with use_backend("dense"):
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=zoo.known())
def pair(request, tmp_path_factory):
    """Load a family's original, and its checkpoint with all that can be quantized."""
    directory = tmp_path_factory.mktemp("zoo")
    tied = zoo.ZOO[request.param][0] != "nanochat"  # the one family that doesn't tie
    zoo.build(request.param, tied=tied).save_pretrained(directory / "source")
    families.save_tokenizer(directory / "source")
    tables: dict[str, Any] = {"embedding": TABLE} if tied else {"embedding": TABLE, "head": TABLE}
    pipeline.quantize(
        Location(directory / "source"), directory / "out", recipe(num_bits=8, **tables)
    )
    loaded = SimpleNamespace(original=load(directory / "source"), quantized=load(directory / "out"))
    yield loaded
    shutil.rmtree(directory)


def plain_tensors(model):
    """Return parameters and buffers but those of layers that are quantized, by name."""
    packed = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (QuantizedWeight, TiedHead))
    }
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in packed}


def test_every_other_tensor_is_that_of_the_original(pair):
    expected = {**dict(pair.original.named_parameters()), **dict(pair.original.named_buffers())}
    for name, tensor in plain_tensors(pair.quantized).items():
        assert torch.equal(tensor, expected[name]), name


def with_weights(quantized, original):
    """Put the dequantized weights of a checkpoint into its original."""
    for name, module in quantized.named_modules():
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            place = original.get_submodule(name).weight
            weight = dequantized(module.tensor())
            transposed = not isinstance(original.get_submodule(name), (nn.Linear, nn.Embedding))
            place.data = weight.T if transposed else weight
    return original


@torch.inference_mode()
def test_logits_are_those_of_the_original_with_these_weights(pair):
    expected = with_weights(pair.quantized, pair.original)(PROMPT, use_cache=False).logits
    got = pair.quantized(PROMPT, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
