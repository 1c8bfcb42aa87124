"""What a card will hold, by headers alone, against what is made there."""

import dataclasses

import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.checkpoint.reader import CheckpointReader
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.pipeline.inspect import memory_of
from qtool.runtime.backends.cuda import backend as cuda
from qtool.runtime.backends.cuda import linear_kernels, room, selection, tiles
from qtool.runtime.backends.cuda.centers import why_no_planes
from qtool.runtime.backends.cuda.ordered import prepare_any
from qtool.runtime.decode.read_model import weights_of
from qtool.scheme import GROUP_DIMS, Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor

FORMATS = st.sampled_from(
    ["affine", "binary_coding", "coded_scales", "dint", "minima", "mixed_rows", "nested"]
)


def tensors_in(value) -> dict[int, int]:
    """Return the bytes of the tensors that a value is made of, each storage once."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    if dataclasses.is_dataclass(value):
        return tensors_in([getattr(value, each.name) for each in dataclasses.fields(value)])
    found: dict[int, int] = {}
    parts = value.values() if isinstance(value, dict) else value
    for each in parts if isinstance(value, list | tuple | dict) else ():
        found |= tensors_in(each)
    return found


@given(
    name=FORMATS,
    num_bits=st.integers(1, 8),
    group_size=st.sampled_from([8, 16, 24, 32, 64, 192, None]),
    group_dim=st.sampled_from(GROUP_DIMS),
    symmetric=st.booleans(),
    shape=st.tuples(st.integers(1, 50), st.integers(1, 600)),
)
def test_bytes_are_those_of_what_is_prepared(
    name, num_bits, group_size, group_dim, symmetric, shape
):
    scheme = WeightScheme(
        num_bits=num_bits, group_size=group_size, group_dim=group_dim, symmetric=symmetric
    )
    tensor = random_tensor(name, scheme, Shape2D(*shape), 0)
    reason = why_no_planes(tensor)
    assert ("9 planes" in str(reason)) == ((name, num_bits) == ("dint", 8))
    if reason is not None:
        assert room.card_bytes(tensor) == 2 * shape[0] * shape[1]
        assert cuda.BACKEND.why_not(tensor, torch.device("cpu")) == reason
        return
    made = prepare_any(tensor, torch.float16)
    unread = dataclasses.replace(tensor, parts={})
    assert room.card_bytes(unread) == sum(tensors_in(made).values())


def test_a_weight_that_tables_run_is_there_twice(monkeypatch):
    small = dataclasses.replace(selection.H100, tables=range(1000, 100_000))
    monkeypatch.setattr(linear_kernels, "selection_for", lambda _: small)
    scheme, shape = WeightScheme(num_bits=3, group_size=64), Shape2D(48, 320)
    tensor = random_tensor("binary_coding", scheme, shape, 1)
    stored = sum(part.nbytes for part in tensor.parts.values())
    assert room.card_bytes(tensor) == tiles.packed_bytes(scheme, shape) + stored
    assert room.card_bytes(tensor, keep_stored=False) == tiles.packed_bytes(scheme, shape)


def test_memory_of_a_checkpoint_is_what_the_decoder_reads(checkpoint):
    check_memory(checkpoint)


def test_memory_of_rows_of_unlike_bits_is_what_the_decoder_reads(mixed_tables):
    check_memory(mixed_tables)


@torch.no_grad()
def check_memory(directory):
    model = load_model(Location(directory), device=torch.device("cpu"), dtype=torch.float16).model
    weights = weights_of(model, backend=cuda.BACKEND)
    rotary = tensors_in(weights.inverse_frequencies)
    memory = memory_of(CheckpointReader(directory))
    assert memory is not None
    assert memory.weight_bytes == sum(tensors_in(weights).values()) - sum(rotary.values())
    assert memory.cache_bytes_per_token == 2 * 2 * 2 * 16 * 2  # layers, kinds, heads, width, bytes


def test_a_family_that_nobody_knows_has_no_memory():
    assert memory_of(CheckpointReader(golden())) is None


def golden():
    from tests.golden.build import HERE

    return HERE / "mixed_rows"
