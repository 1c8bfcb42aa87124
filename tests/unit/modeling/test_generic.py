import pytest
import torch
from torch import nn

from qtool.errors import ModelError
from qtool.modeling.generic import adapter_of, find_adapter


class Decoder(nn.Module):
    """A model of unknown family with the two methods that transformers' models have."""

    base_model_prefix = "core"

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.core = nn.Module()
        self.core.table = nn.Embedding(7, 4)
        self.core.stack = blocks
        self.out = nn.Linear(4, 7)

    def get_input_embeddings(self):
        return self.core.table

    def get_output_embeddings(self):
        return self.out


def block(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width))


def test_names_of_an_unknown_family_are_found():
    adapter = adapter_of(Decoder(nn.ModuleList([block(), block()])), "unknown")
    assert adapter.blocks == "core.stack"
    assert adapter.linears == (("1",), ("2",))
    assert (adapter.embedding, adapter.head, adapter.base_prefix) == ("core.table", "out", "core")


def test_largest_list_of_blocks_is_the_decoder():
    model = Decoder(nn.ModuleList([block(), block()]))
    model.core.adapters = nn.ModuleList([nn.Linear(1, 1)])
    assert adapter_of(model, "unknown").blocks == "core.stack"


@pytest.mark.parametrize(
    "blocks",
    [
        nn.Identity(),
        nn.ModuleList([nn.LayerNorm(4)]),
        nn.ModuleList([block(), nn.Linear(4, 4)]),
    ],
    ids=["no list", "no linears", "unlike blocks"],
)
def test_model_without_one_list_of_like_blocks_is_refused(blocks):
    with pytest.raises(ModelError, match=r"No list of decoder blocks .*adapters/unknown\.py"):
        adapter_of(Decoder(blocks), "unknown")


def test_experts_in_one_tensor_are_refused():
    stacked = block()
    stacked.experts = nn.Parameter(torch.zeros(2, 4, 4))
    with pytest.raises(ModelError, match=r"stack the weights of experts \(experts\)"):
        adapter_of(Decoder(nn.ModuleList([stacked])), "unknown")


def test_directory_that_transformers_cannot_build_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ModelError, match="transformers can't build this model without remote code"):
        find_adapter(tmp_path)
