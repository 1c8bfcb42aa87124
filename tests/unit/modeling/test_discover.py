import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qtool.errors import ModelError
from qtool.modeling.discover import adapter_of, in_order
from qtool.modeling.kinds_of_weights import plain_weights


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
    ],
    ids=["no list", "no linears"],
)
def test_model_without_blocks_made_of_linears_is_refused(blocks, reason):
    with pytest.raises(ModelError, match=reason):
        adapter_of(Decoder(blocks), "unknown")


def test_a_second_list_of_blocks_is_refused():
    model = Decoder(nn.ModuleList([block(), block()]))
    model.core.other = nn.ModuleList([block()])
    with pytest.raises(ModelError, match=r"several lists of blocks \(core\.stack, core\.other\)"):
        adapter_of(model, "unknown")


def test_the_decoder_is_found_beside_a_larger_encoder():
    model = Decoder(nn.ModuleList([block(), block()]))
    model.core.vision = nn.Module()
    model.core.vision.layers = nn.ModuleList([block(64) for _ in range(4)])
    assert adapter_of(model, "unknown").blocks == "core.stack"


def with_part(name: str, part: nn.Module | nn.Parameter) -> nn.Module:
    module = block()
    setattr(module, name, part)
    return module


def test_blocks_that_differ_have_all_their_linears_in_the_order_of_each():
    wide = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    adapter = adapter_of(Decoder(nn.ModuleList([wide, with_part("0", nn.Linear(4, 4))])), "unknown")
    assert adapter.linears == (("0",), ("1",), ("2",))


names = st.lists(st.sampled_from("abcdefgh"), unique=True)


@given(st.lists(names.map(sorted), max_size=4))
def test_order_of_lists_that_agree_is_kept(lists):
    merged = in_order(lists)
    assert sorted(merged) == sorted(set().union(*lists))
    for one in lists:
        assert [name for name in merged if name in one] == one


class Mixer(nn.Module):
    """A recurrence as transformers has it: a short convolution, gates, and linears around."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(4, 4, 2)
        self.in_proj, self.x_proj, self.dt_proj = (nn.Linear(4, 4) for _ in range(3))
        self.out_proj = nn.Linear(4, 4)


def test_what_is_fragile_around_a_recurrence_is_sensitive_and_only_there():
    blocks = nn.ModuleList([with_part("mixer", Mixer()), with_part("out_proj", nn.Linear(4, 4))])
    adapter = adapter_of(Decoder(blocks), "unknown")
    assert adapter.sensitive == ("mixer.x_proj", "mixer.dt_proj", "mixer.out_proj")
    assert {("mixer.in_proj",), ("out_proj",)} <= set(adapter.linears)


@pytest.mark.parametrize(
    ("name", "part", "why", "is_meant"),
    [
        ("experts", nn.Parameter(torch.zeros(2, 4, 4)), "of 3 dimensions", False),
        ("decay", nn.Parameter(torch.zeros(4, 4)), "takes for no linear", False),
        ("conv", nn.Conv1d(4, 4, 2), "a convolution", True),
        ("encoder_attn", nn.Linear(4, 4), "looks at an encoder", True),
        ("weights_proj", nn.Linear(4, 4), "own code reads it", False),
    ],
)
def test_weights_that_are_no_linears_have_a_reason(name, part, why, is_meant):
    model = Decoder(nn.ModuleList([block(), with_part(name, part)]))
    (plain,) = plain_weights(model).values()
    assert why in plain.why
    assert plain.is_meant == is_meant


def test_lists_of_norms_inside_a_block_are_no_obstacle():
    norms = nn.ModuleList([nn.LayerNorm(4)])
    model = Decoder(nn.ModuleList([with_part("norms", norms), with_part("norms", norms)]))
    assert adapter_of(model, "unknown").linears == (("1",), ("2",))


def test_model_without_a_head_is_refused():
    model = Decoder(nn.ModuleList([block()]))
    setattr(model, "get_output_embeddings", lambda: None)  # noqa: B010
    with pytest.raises(ModelError, match="no plain token embedding and output head"):
        adapter_of(model, "unknown")
