"""Embedding and head with rows of unlike bits: modules, decoder, kernels, and on a card."""

import pytest
import torch

from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.runtime.backends._choose import use_backend
from qtool.runtime.backends.cuda import backend as cuda
from qtool.runtime.backends.cuda import driver
from qtool.runtime.backends.cuda.decode_ops import KernelOps
from qtool.runtime.backends.cuda.launch import Card
from qtool.runtime.backends.cuda.mixed import MixedWeight
from qtool.runtime.decode.read_model import weights_of
from qtool.runtime.decode.runner import DecodeRunner
from qtool.runtime.decode.torch_ops import OPS
from qtool.runtime.modules import QuantizedEmbedding, QuantizedLinear, TiedHead
from tests.helpers import dequantized, normal
from tests.kernels.host import Recorder
from tests.runtime_decode.models import prompt

CARD = Card(multiprocessors=2, shared_bytes=227 * 1024)


def load(directory, dtype=torch.float16, device="cpu"):
    return load_model(Location(directory), device=torch.device(device), dtype=dtype).model


def is_tied(model) -> bool:
    return isinstance(model.lm_head, TiedHead)


@pytest.mark.parametrize("backend", ["reference", "dense"])
@torch.no_grad()
def test_tables_are_those_of_the_definition(mixed_tables, backend):
    with use_backend(backend):
        model = load(mixed_tables, torch.float32)
        table, head = model.get_input_embeddings(), model.lm_head
        assert isinstance(table, QuantizedEmbedding)
        index, x = torch.tensor([[0, 95, 3]]), normal(4, 64)
        weight = dequantized(table.tensor())
        torch.testing.assert_close(table(index), weight[index])
        if not is_tied(model):
            assert isinstance(head, QuantizedLinear)
            weight = dequantized(head.tensor())
        torch.testing.assert_close(head(x), x @ weight.T)


@torch.no_grad()
def test_whole_steps_by_kernels(mixed_tables):
    model, ids = load(mixed_tables), prompt(2, 14)
    weights = weights_of(model, backend=cuda.BACKEND)
    assert isinstance(weights.embedding, MixedWeight) and isinstance(weights.head, MixedWeight)
    assert (weights.head is weights.embedding) == is_tied(model), "one table, held once"
    launch = Recorder()
    runners = [
        DecodeRunner(weights, ops, max_length=20, batch=2) for ops in (OPS, KernelOps(launch, CARD))
    ]
    logits = [[runner.prefill(ids[:, :12]).clone()] for runner in runners]
    for index in (12, 13):
        for each, runner in zip(logits, runners, strict=True):
            each.append(runner.step(ids[:, index]).clone())
    torch.testing.assert_close(*map(torch.stack, logits), rtol=0, atol=0.02)
    with use_backend("reference"):
        expected = load(mixed_tables)(ids).logits[:, 11:]
    torch.testing.assert_close(torch.stack(logits[1], 1), expected, rtol=0, atol=0.03)
    classes = len(weights.head.classes)
    step = launch.names[-launch.names[::-1].index("gather_rows") - classes :]
    assert step[:classes] == ["gather_rows"] * classes
    assert step[-2:] == ["bit_plane_classes", "greedy"], "the head: one launch for all classes"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_a_model_decodes_on_a_card(mixed_tables, dtype, batch):
    pytest.importorskip("cupy")
    with use_backend("cuda"):
        model = load(mixed_tables, dtype, "cuda")
    ids = prompt(batch, 40).cuda()
    expected = model(ids).logits[:, 11:]
    with use_backend("reference"):
        exact = load(mixed_tables, torch.float32)(ids.cpu()).logits[:, 11:]
    atol = 0.03 if dtype == torch.float16 else 0.2
    torch.testing.assert_close(expected.cpu().float(), exact, rtol=0, atol=atol)
    weights = weights_of(model)
    assert isinstance(weights.head, MixedWeight)
    runner = DecodeRunner(
        weights, KernelOps(driver.launch, driver.card_of(0)), max_length=64, batch=batch
    )
    logits = [runner.prefill(ids[:, :12]).clone()]
    logits += [runner.step(tokens).clone() for tokens in ids[:, 12:].T]
    torch.testing.assert_close(torch.stack(logits, 1), expected, rtol=0, atol=atol)
    assert runner.captured.recorded is not None, "a step is one graph"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@torch.no_grad()
def test_a_compiled_model_is_one_graph(mixed_tables):
    pytest.importorskip("cupy")
    with use_backend("cuda"):
        model = load(mixed_tables, torch.float16, "cuda")
    table, head = model.get_input_embeddings(), model.lm_head

    def ends(index):
        return head(torch.tanh(table(index)))

    compiled = torch.compile(ends, fullgraph=True, dynamic=True)
    for length in (1, 5, 40):
        index = prompt(1, length).cuda()
        torch.testing.assert_close(compiled(index), ends(index), rtol=1e-2, atol=1e-2)
