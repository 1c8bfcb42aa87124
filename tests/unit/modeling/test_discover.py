import pytest
import torch
from torch import nn

from qtool.errors import ModelError
from qtool.modeling.discover import adapter_of


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
    ("blocks", "reason"),
    [
        (nn.Identity(), r"No list of decoder blocks in .*families/unknown\.py"),
        (nn.ModuleList([nn.LayerNorm(4)]), r"hold no linears \(LayerNorm\).*families/unknown\.py"),
        (nn.ModuleList([block(), nn.Linear(4, 4)]), r"aren't alike \(Linear, Sequential\)"),
        (
            nn.ModuleList([block(), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))]),
            r"aren't alike \(2 is in only one of blocks 0 and 1",
        ),
    ],
    ids=["no list", "no linears", "unlike blocks", "unlike linears"],
)
def test_model_without_one_list_of_like_blocks_is_refused(blocks, reason):
    with pytest.raises(ModelError, match=reason):
        adapter_of(Decoder(blocks), "unknown")


def with_part(name: str, part: nn.Module | nn.Parameter) -> nn.Module:
    module = block()
    setattr(module, name, part)
    return module


@pytest.mark.parametrize(
    ("name", "part", "reason"),
    [
        ("experts", nn.Parameter(torch.zeros(2, 4, 4)), "experts stacked in one tensor"),
        ("parts", nn.ModuleList([nn.Linear(4, 4)]), r"lists of linears \(parts\)"),
        ("conv", nn.Conv1d(4, 4, 2), r"convolutions \(conv\)"),
        ("decay", nn.Parameter(torch.zeros(1, 1, 4)), r"parameters of 3 dimensions \(decay\)"),
    ],
)
def test_what_else_a_block_is_made_of_is_named_wherever_it_is(name, part, reason):
    blocks = nn.ModuleList([block(), with_part(name, part)])
    with pytest.raises(ModelError, match=rf"{reason}.* in core\.stack\.1.*limitations"):
        adapter_of(Decoder(blocks), "unknown")


def test_lists_of_norms_inside_a_block_are_no_obstacle():
    norms = nn.ModuleList([nn.LayerNorm(4)])
    model = Decoder(nn.ModuleList([with_part("norms", norms), with_part("norms", norms)]))
    assert adapter_of(model, "unknown").linears == (("1",), ("2",))


def test_model_without_a_head_is_refused():
    model = Decoder(nn.ModuleList([block()]))
    setattr(model, "get_output_embeddings", lambda: None)  # noqa: B010
    with pytest.raises(ModelError, match="no plain token embedding and output head"):
        adapter_of(model, "unknown")
