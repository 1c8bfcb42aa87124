import pytest
import torch
from torch import nn

from qtool.checkpoint.manifest import LayerEntry, Manifest
from qtool.errors import BackendError, CheckpointError, UnknownNameError
from qtool.runtime.huggingface import install
from qtool.runtime.modules import QuantizedEmbedding, QuantizedLinear, TiedHead
from qtool.runtime.select import choose_backend, load_backend, use_backend, wanted_backend
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import dequantized, normal

CPU = torch.device("cpu")
SCHEME = WeightScheme(num_bits=3, group_size=16)


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
    torch.testing.assert_close(linear(x), nn.functional.linear(x, weight, bias))


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
    torch.testing.assert_close(head(x), x @ weight.T)
    assert list(head.state_dict()) == []


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double", "float"])
def test_cast_of_the_model_leaves_the_parts_in_their_dtypes(convert):
    linear, weight = filled(QuantizedLinear(entry(), None))
    before = {name: part.clone() for name, part in linear.named_buffers()}
    getattr(linear, convert)()
    for name, part in linear.named_buffers():
        assert part.dtype == before[name].dtype
        assert torch.equal(part, before[name])
    x = normal(3, 40)
    torch.testing.assert_close(linear(x), x @ weight.T)


def test_activations_of_another_dtype_are_prepared_anew():
    linear, weight = filled(QuantizedLinear(entry(), None))
    x = normal(3, 40)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        assert linear(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(linear(x), x @ weight.T)


def test_loading_other_parts_after_a_call_and_a_move_is_noticed():
    linear, _ = filled(QuantizedLinear(entry(), None), seed=0)
    linear(normal(1, 40))
    linear, weight = filled(linear, seed=1)
    linear.to(CPU)
    x = normal(3, 40)
    torch.testing.assert_close(linear(x), x @ weight.T)


def test_representation_tells_shape_and_scheme():
    text = repr(QuantizedLinear(entry(), None))
    assert "40 -> 12, binary_coding" in text
    assert "num_bits=3" in text


def test_best_backend_is_chosen_unless_one_is_asked_for(monkeypatch):
    tensor = random_tensor("binary_coding", SCHEME, Shape2D(4, 32), 0)
    assert choose_backend(tensor, CPU, None).priority >= load_backend("reference").priority
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
    install(model, manifest(proj=entry(), table=entry()))
    assert isinstance(model.proj, QuantizedLinear)
    assert isinstance(model.table, QuantizedEmbedding)
    assert type(model.head) is nn.Linear
    assert model.proj.bias is not None


def test_install_refuses_another_shape():
    with pytest.raises(
        CheckpointError, match=r"proj has shape \(12, 40\) in the model, \(12, 44\)"
    ):
        install(Tiny(), manifest(proj=entry((12, 44))))


def test_install_refuses_a_layer_without_a_plain_weight():
    model = Tiny()
    install(model, manifest(proj=entry()))
    with pytest.raises((BackendError, AttributeError)):
        install(model, manifest(proj=entry()))


def test_head_shares_only_a_quantized_table():
    with pytest.raises(CheckpointError, match="shares proj, which is no quantized embedding"):
        install(Tiny(), manifest(proj=entry(), head=entry(shared_with="proj")))
