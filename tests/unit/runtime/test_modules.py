import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qtool.checkpoint.manifest import LayerEntry, Manifest
from qtool.errors import BackendError, CheckpointError, UnknownNameError
from qtool.integrations.transformers.install import install_modules
from qtool.runtime.backends._choose import choose_backend, load_backend, use_backend, wanted_backend
from qtool.runtime.held import Held
from qtool.runtime.modules import QuantizedEmbedding, QuantizedLinear, TiedHead
from qtool.scheme import ActivationScheme, Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import dequantized, normal

CPU = torch.device("cpu")
SCHEME = WeightScheme(num_bits=3, group_size=16)


def assert_near(got, expected):
    """Compare numbers; the backend that is chosen may look up sums of inputs in 16 bits."""
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-3)


def entry(shape: tuple[int, int] = (12, 40), **changes) -> LayerEntry:
    values = {"format": "binary_coding", "scheme": SCHEME, "method": "bcq", **changes}
    return LayerEntry(shape=Shape2D(*shape), **values)


def filled(module, seed=0):
    """Give a module the parts of a random weight; return both."""
    tensor = random_tensor("binary_coding", SCHEME, module.entry.shape, seed)
    for part, values in tensor.parts.items():
        module.get_buffer(part).copy_(values)
    return module, dequantized(tensor)


def test_linear_adds_the_bias_to_the_product():
    bias = normal(12)
    linear, weight = filled(QuantizedLinear(entry(), bias))
    assert linear.bias is not None
    linear.bias.data = bias
    x = normal(2, 5, 40)
    assert_near(linear(x), nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_embedding_gives_rows_in_its_dtype(factor):
    table, weight = filled(QuantizedEmbedding(entry(), torch.float32, factor))
    index = torch.tensor([[0, 11], [3, 3]])
    torch.testing.assert_close(table(index), weight[index] * factor)
    assert table.to(torch.bfloat16)(index).dtype == torch.bfloat16


def test_tied_head_uses_the_table_and_holds_nothing_of_its_own():
    table, weight = filled(QuantizedEmbedding(entry(), torch.float32))
    head = TiedHead(table)
    x = normal(3, 40)
    assert_near(head(x), x @ weight.T)
    assert list(head.state_dict()) == []


@pytest.mark.parametrize("backend", ["dense", "reference"])
@pytest.mark.parametrize("scheme", [None, ActivationScheme(num_bits=8)])
def test_what_lies_below_a_layer_learns_through_it(backend, scheme):
    with use_backend(backend):
        linear, weight = filled(QuantizedLinear(entry(activation=scheme), normal(12)))
        table, rows = filled(QuantizedEmbedding(entry(), torch.float32))
    x, wanted = normal(5, 40).requires_grad_(), normal(5, 12, seed=1)
    for module, expected in ((linear, wanted @ weight), (TiedHead(table), wanted @ rows)):
        x.grad = None
        module(x).backward(wanted)
        torch.testing.assert_close(x.grad, expected)
    assert linear.bias is not None
    torch.testing.assert_close(linear.bias.grad, wanted.sum(0))
    assert not module(x.detach()).requires_grad


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double", "float"])
def test_cast_of_the_model_leaves_the_parts_in_their_dtypes(convert):
    linear, weight = filled(QuantizedLinear(entry(), None))
    before = {name: part.clone() for name, part in linear.named_buffers()}
    getattr(linear, convert)()
    for name, part in linear.named_buffers():
        assert part.dtype == before[name].dtype
        assert torch.equal(part, before[name])
    x = normal(3, 40)
    assert_near(linear(x), x @ weight.T)


def test_activations_of_another_dtype_are_prepared_anew():
    linear, weight = filled(QuantizedLinear(entry(), None))
    x = normal(3, 40)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        assert linear(x.to(dtype)).dtype == dtype
    assert_near(linear(x), x @ weight.T)


def test_other_parts_that_are_loaded_after_a_call_are_used():
    linear, _ = filled(QuantizedLinear(entry(), None), seed=0)
    x = normal(3, 40)
    linear(x)
    other, weight = filled(QuantizedLinear(entry(), None), seed=1)
    linear.load_state_dict(other.state_dict())
    assert_near(linear(x), x @ weight.T)


def test_a_move_that_changes_nothing_keeps_the_layout_and_others_forget_it():
    linear, _ = filled(QuantizedLinear(entry(), normal(12)))
    linear(normal(1, 40))
    held, contents = linear._held, linear.contents
    names = list(linear.state_dict())
    for _ in range(2):
        linear.to(CPU).half().float()
        assert linear._held is held and linear.contents is contents
        assert list(linear.state_dict()) == names
    linear.to("meta")
    assert linear._held is None and linear.contents is not contents
    assert {part.device.type for part in linear.state_dict().values()} == {"meta"}


def waiting(seed=0):
    """Return a linear whose parts wait on the CPU; what executes it is called meta."""
    linear, _ = filled(QuantizedLinear(entry(), None), seed)
    meta = torch.device("meta")
    linear._held = Held(load_backend("dense"), None, torch.float32, meta)
    return linear, meta


def test_parts_that_wait_go_home_when_others_are_loaded():
    linear, meta = waiting()
    assert linear.device == meta
    assert {part.device for part in linear.tensor().parts.values()} == {meta}
    linear.to(meta)
    assert {part.device for part in linear.buffers()} == {CPU}, "no reason to move"
    linear.load_state_dict({name: part.to(meta) for name, part in linear.state_dict().items()})
    assert linear._held is None
    assert {part.device for part in linear.buffers()} == {meta}


def test_copies_have_the_parts_at_home_and_no_layout():
    linear, meta = waiting()
    again = copy.deepcopy(linear)
    assert again._held is None and again.device == meta
    assert linear._held is not None
    assert {part.device for part in linear.buffers()} == {CPU}


def test_pickles_hold_the_parts_alone_and_predict_the_same(tmp_path):
    linear, _ = filled(QuantizedLinear(entry(), normal(12)))
    assert linear.bias is not None
    linear.bias.data = normal(12)
    x, before = normal(3, 40), len(pickle.dumps(linear))
    expected = linear(x)
    assert len(pickle.dumps(linear)) < before + 100
    torch.save(linear, tmp_path / "linear.pt")
    loaded = torch.load(tmp_path / "linear.pt", map_location="cpu", weights_only=False)
    for again in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear)), loaded):
        assert again.backend is None
        assert torch.equal(again(x), expected)


@pytest.mark.parametrize("backend", ["dense", "reference"])
def test_autocast_casts_the_input_as_it_does_for_plain_linears(backend):
    with use_backend(backend):
        linear, weight = filled(QuantizedLinear(entry(), None))
    plain = nn.Linear(40, 12, bias=False)
    plain.weight.data = weight
    x = normal(3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = linear(x), plain(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    assert linear._held is not None and linear._held.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected)


class Counting(type(load_backend("dense"))):  # type: ignore[misc]
    """Counts how often a weight is prepared."""

    prepared = 0

    def prepare(self, tensor, dtype):
        type(self).prepared += 1
        return super().prepare(tensor, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_tied_head_shares_the_layout_of_the_table_whatever_its_input(dtype, monkeypatch):
    table, weight = filled(QuantizedEmbedding(entry(), dtype))
    head, index, x = TiedHead(table), torch.tensor([3]), normal(3, 40)
    backend = Counting()
    monkeypatch.setattr("qtool.runtime.modules.choose_backend", lambda *_args: backend)
    monkeypatch.setattr(Counting, "prepared", 0)
    for given in (torch.bfloat16, torch.float32):
        assert table(index).dtype == dtype
        got = head(x.to(given))
        assert got.dtype == given
        torch.testing.assert_close(got.float(), x @ weight.T, rtol=0.02, atol=0.02)
        with torch.autocast("cpu", torch.bfloat16):
            assert head(x.to(given)).dtype == torch.bfloat16
    assert Counting.prepared == 1


def test_representation_tells_shape_and_scheme():
    text = repr(QuantizedLinear(entry(), None))
    assert "40 -> 12, binary_coding" in text
    assert "num_bits=3" in text


def test_best_backend_is_chosen_unless_one_is_asked_for(monkeypatch):
    tensor = random_tensor("binary_coding", SCHEME, Shape2D(4, 32), 0)
    dense, reference = load_backend("dense"), load_backend("reference")
    monkeypatch.setattr(type(load_backend("cpu")), "why_not", lambda *_args: "No compiler.")
    assert choose_backend(tensor, CPU, None) is dense
    with monkeypatch.context() as patch:
        patch.setattr(type(reference), "priority", dense.priority + 1)
        assert choose_backend(tensor, CPU, None) is reference
        patch.setattr(type(reference), "why_not", lambda *_args: "It is Sunday.")
        assert choose_backend(tensor, CPU, None) is dense
    assert choose_backend(tensor, CPU, "reference").name == "reference"
    assert wanted_backend() is None
    monkeypatch.setenv("QTOOL_BACKEND", "dense")
    assert wanted_backend() == "dense"
    with use_backend("reference"):
        assert wanted_backend() == "reference"
    assert wanted_backend() == "dense"


def test_backend_that_cannot_says_why(monkeypatch):
    backend = load_backend("reference")
    monkeypatch.setattr(type(backend), "why_not", lambda *_args: "It is Sunday.")
    tensor = random_tensor("binary_coding", SCHEME, Shape2D(4, 32), 0)
    with pytest.raises(BackendError, match="'reference' can't run this weight: It is Sunday"):
        choose_backend(tensor, CPU, "reference")


def test_unknown_backend_is_refused_before_a_model_is_loaded():
    with (
        pytest.raises(UnknownNameError, match="Did you mean 'reference'"),
        use_backend("referense"),
    ):
        pytest.fail("entered")


class Tiny(nn.Module):
    """A model with one linear and a head."""

    base_model_prefix = "model"
    config = SimpleNamespace(architectures=["Tiny"])

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 40)
        self.proj = nn.Linear(40, 12)
        self.head = nn.Linear(40, 12, bias=False)

    def get_output_embeddings(self):
        return self.head


def manifest(**layers: LayerEntry) -> Manifest:
    return Manifest(tool_version="0", recipe={}, layers=layers)


def test_install_replaces_what_the_manifest_names():
    model = Tiny()
    install_modules(model, manifest(proj=entry(), table=entry()))
    assert isinstance(model.proj, QuantizedLinear)
    assert isinstance(model.table, QuantizedEmbedding)
    assert type(model.head) is nn.Linear
    assert model.proj.bias is not None


def test_install_refuses_another_shape():
    with pytest.raises(
        CheckpointError, match=r"proj has shape \(12, 40\) in the model, \(12, 44\)"
    ):
        install_modules(Tiny(), manifest(proj=entry((12, 44))))


def test_install_refuses_a_layer_without_a_plain_weight():
    model = Tiny()
    install_modules(model, manifest(proj=entry()))
    with pytest.raises((BackendError, AttributeError)):
        install_modules(model, manifest(proj=entry()))


def test_head_shares_only_a_quantized_table():
    with pytest.raises(CheckpointError, match="shares proj, which is no quantized embedding"):
        install_modules(Tiny(), manifest(proj=entry(), head=entry(shared_with="proj")))
