"""Quantized experts through the decoder: by torch, and by kernels launched on the CPU."""

import copy
import pickle

import pytest
import torch

from qtool import pipeline
from qtool.integrations.transformers.generate import use_runner
from qtool.modeling.locate import Location
from qtool.runtime.backends._choose import use_backend
from qtool.runtime.backends.cuda import backend as cuda
from qtool.runtime.backends.cuda.decode_ops import KernelOps
from qtool.runtime.backends.cuda.expert_products import can_capture
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.launch import Card
from qtool.runtime.decode.read_model import weights_of, why_not
from qtool.runtime.decode.runner import DecodeRunner
from qtool.runtime.decode.torch_ops import OPS
from tests import families, mixtures
from tests.helpers import recipe
from tests.kernels.host import Recorder
from tests.runtime_decode.models import prompt

transformers = pytest.importorskip("transformers", minversion="5.0")

CARD = Card(multiprocessors=4, shared_bytes=144 * 1024)


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def checkpoint(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("experts")
    mixtures.build(request.param).save_pretrained(directory / "source")
    families.save_tokenizer(directory / "source")
    pipeline.quantize(Location(directory / "source"), directory / "out", recipe(num_bits=4))
    return directory / "out"


def load(directory, dtype=torch.float16, backend="reference"):
    with use_backend(backend):
        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def decoded(weights, ops, ids, begin=8):
    runner = DecodeRunner(weights, ops, max_length=40, batch=len(ids))
    logits = [runner.prefill(ids[:, :begin]).clone()]
    logits += [runner.step(ids[:, index]).clone() for index in range(begin, ids.shape[1])]
    return torch.stack(logits, 1)


@pytest.mark.parametrize("backend", ["reference", "dense"])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])
@torch.no_grad()
def test_logits_are_those_of_the_dequantized_files(checkpoint, backend, dtype, allowed):
    ids = prompt(2, 12)
    expected = load(checkpoint, torch.float32)(ids).logits[:, 7:]
    model = load(checkpoint, dtype, backend)
    got = decoded(weights_of(model), OPS, ids)
    assert float((got.float() - expected).norm() / expected.norm()) < allowed
    torch.testing.assert_close(model(ids).logits[:, 7:].float(), expected, rtol=0, atol=0.02)


@torch.no_grad()
def test_a_step_by_kernels_multiplies_by_the_chosen_experts_in_two_launches(checkpoint):
    ids, launch = prompt(2, 10), Recorder()
    expected = load(checkpoint, torch.float32)(ids).logits[:, 7:]
    weights = weights_of(load(checkpoint), backend=cuda.BACKEND)
    experts = weights.layers[0].experts
    assert experts is not None and can_capture(experts)
    assert isinstance(experts.all_gate_up, KernelWeight)
    got = decoded(weights, KernelOps(launch, CARD), ids)
    assert float((got.float() - expected).norm() / expected.norm()) < 3e-3
    assert (
        sum(name.endswith("_experts") for name in launch.names) == 2 * 2 * 3
    )  # blocks, products, passes


@torch.no_grad()
def test_modules_read_the_weights_that_the_decoder_has(checkpoint):
    model, ids = load(checkpoint, torch.float32, "dense"), prompt(1, 10)
    before = model(ids).logits
    experts = weights_of(model).layers[0].experts
    assert experts is not None and isinstance(experts.all_down, torch.Tensor)
    for index in range(4):
        part = model.model.layers[0].mlp.experts.linear("down_proj", index).prepare(torch.float32)
        assert part[1].untyped_storage().data_ptr() == experts.all_down.data_ptr()
    torch.testing.assert_close(model(ids).logits, before)


def test_it_generates_through_the_runner_as_without_and_is_copied_and_pickled(checkpoint):
    model, ids = load(checkpoint, torch.float32), prompt(1, 9)
    assert why_not(model) is None
    with use_runner("never"):
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with use_runner("always"):
            assert torch.equal(other.generate(ids, max_new_tokens=6, do_sample=False), expected)


def test_what_the_decoder_does_not_know_of_experts_is_said(checkpoint):
    model = load(checkpoint, torch.float32)
    model.model.layers[1].mlp.experts.act_fn = torch.nn.GELU()
    assert "another activation" in (why_not(model) or "")
    model.model.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    assert "beside its experts" in (why_not(model) or "")
