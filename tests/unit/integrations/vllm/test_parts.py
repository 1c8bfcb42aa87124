"""What a rank of vLLM holds of stored layers, without vLLM."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qtool.formats
from qtool import plugins
from qtool.checkpoint.manifest import LayerEntry, codec
from qtool.checkpoint.reader import check_values
from qtool.errors import BackendError, CheckpointError
from qtool.integrations.vllm.incoming import Incoming, RankWeight, dummy_parts
from qtool.integrations.vllm.products import merged, multiply_all, prepare_products
from qtool.integrations.vllm.slices import (
    Rank,
    StoredLayer,
    Wanted,
    embedding_name,
    linear_rows,
    source_number,
    sources_of,
    start_of,
    wanted_of,
)
from qtool.scheme import ActivationScheme, Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor as random_bits
from tests.helpers import normal, run_python

CPU = torch.device("cpu")
FORMATS = plugins.names(qtool.formats)
CUT_BY_INPUTS = [name for name in FORMATS if name != "ordered_affine"]
EIGHT = WeightScheme(num_bits=4, group_size=8)


def random_tensor(name, scheme, shape, seed):
    """Return a random weight whose scales aren't below zero, as no stored ones are."""
    tensor = random_bits(name, scheme, shape, seed)
    layout = codec(name).layout(tensor.scheme, shape)
    parts = {part: t.abs() if layout[part].lowest == 0 else t for part, t in tensor.parts.items()}
    return replace(tensor, parts=parts)


def stored(name, tensor, activation=None):
    scheme, shape = tensor.scheme, tensor.shape
    entry = LayerEntry(
        format=tensor.format, scheme=scheme, shape=shape, method="rtn", activation=activation
    )
    return StoredLayer(name, entry)


def dense(tensor):
    return codec(tensor.format).dequantize(tensor, torch.float32)


def received(sources, wanted, tensors):
    """Return what has come once all tensors were handed over, the last first."""
    incoming = Incoming(sources, wanted, CPU)
    for number, tensor in reversed(list(enumerate(tensors))):
        for part, values in tensor.parts.items():
            incoming.add(number, part, values)
    return incoming.pieces()


@given(size=st.integers(1, 9), pieces=st.integers(1, 4), alike=st.integers(1, 4))
def test_parts_of_ranks_cover_a_weight_each_as_often(size, pieces, alike):
    count = pieces * alike
    starts = [start_of(size * pieces, size, Rank(number, count)) for number in range(count)]
    assert starts == [size * (number // alike) for number in range(count)]


@pytest.mark.parametrize(("total", "size", "count"), [(10, 4, 2), (4, 8, 2), (12, 4, 2), (8, 2, 6)])
def test_parts_that_do_not_make_a_weight_are_refused(total, size, count):
    with pytest.raises(BackendError, match="can't hold"):
        start_of(total, size, Rank(0, count))


def test_rows_of_weights_that_are_stored_together_are_found():
    sizes, totals = (8, 4, 4), (16, 8, 8)
    second = linear_rows(32, sizes, totals, Rank(1, 2))
    assert second == (range(8, 16), range(20, 24), range(28, 32))
    with pytest.raises(BackendError, match="It has 30 rows; the model has 32"):
        linear_rows(30, sizes, totals, Rank(1, 2))


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=8)
@given(count=st.sampled_from([1, 2, 4]), seed=st.integers(0, 1000), bits=st.integers(3, 7))
def test_ranks_together_hold_what_is_stored_to_the_bit(name, count, seed, bits):
    scheme = WeightScheme(num_bits=bits, group_size=8)
    sizes = [16, 8, 8]
    tensors = [
        random_tensor(name, scheme, Shape2D(rows, 32), seed + rows + number)
        for number, rows in enumerate(sizes)
    ]
    sources = [stored(f"l.{each}_proj", t) for each, t in zip("qkv", tensors, strict=True)]
    x, found = normal(3, 32), []
    for number in range(count):
        rank = Rank(number, count)
        shares = [rows // count for rows in sizes]
        pieces = received(sources, wanted_of(sources, shares, sizes, 32, rank), tensors)
        assert [tuple(piece.weight.shape) for piece in pieces] == [(share, 32) for share in shares]
        y = multiply_all(prepare_products(pieces, torch.float32), x)
        found.append(y.split(shares, -1))
    for parts, tensor in zip(zip(*found, strict=True), tensors, strict=True):
        expected = x @ dense(tensor).T
        torch.testing.assert_close(torch.cat(parts, -1), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", CUT_BY_INPUTS)
def test_the_defaults_of_a_model_change_no_weight(name):
    tensor = random_tensor(name, EIGHT, Shape2D(16, 32), 3)
    source, found = stored("l.embed", tensor), []
    for dtype, device in ((torch.float32, "cpu"), (torch.bfloat16, "meta")):
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                wanted = [Wanted(columns=16, rank=Rank(1, 2), table=range(4, 12))]
                pieces = received([source], wanted, [tensor])
                found.append(prepare_products(pieces, torch.float32)[0].prepared)
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*found)


def test_inputs_that_are_sorted_by_group_stay_together():
    tensor = random_tensor("ordered_affine", EIGHT, Shape2D(12, 32), 3)
    source = stored("l.o_proj", tensor)
    wanted = wanted_of([source], [12], [12], 8, Rank(1, 4))
    with pytest.raises(BackendError, match=r"l\.o_proj, .* over 4 ranks: .*aren't neighbours"):
        received([source], wanted, [tensor])


@pytest.mark.parametrize("name", CUT_BY_INPUTS)
def test_columns_of_ranks_add_up(name, monkeypatch):
    monkeypatch.setenv("QTOOL_BACKEND", "dense")  # no table of a rank has other steps
    tensor = random_tensor(name, EIGHT, Shape2D(12, 32), 3)
    source, x, total = stored("l.o_proj", tensor), normal(3, 32), torch.zeros(3, 12)
    for number, part in enumerate(x.chunk(4, -1)):
        wanted = wanted_of([source], [12], [12], 8, Rank(number, 4))
        total += multiply_all(
            prepare_products(received([source], wanted, [tensor]), torch.float32), part
        )
    torch.testing.assert_close(total, x @ dense(tensor).T, rtol=1e-5, atol=1e-3)


def test_a_layer_that_is_not_quantized_lies_beside_others():
    tensor, plain = random_tensor("affine", EIGHT, Shape2D(8, 16), 0), normal(8, 16)
    sources = [stored("l.q_proj", tensor), StoredLayer("l.k_proj", None)]
    incoming = Incoming(sources, wanted_of(sources, [4, 4], [8, 8], 16, Rank(1, 2)), CPU)
    assert incoming.part_names() == [*tensor.parts, "weight"]
    incoming.add(1, "weight", plain)
    for part, values in tensor.parts.items():
        incoming.add(0, part, values)
    pieces, x = incoming.pieces(), normal(2, 16)
    expected = x @ torch.cat([dense(tensor)[4:], plain[4:]]).T
    found = multiply_all(prepare_products(pieces, torch.float32), x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


def test_neighbours_that_agree_become_one_to_the_bit():
    one, two, other = (
        random_tensor("binary_coding", WeightScheme(num_bits=bits, group_size=8), shape, 0)
        for bits, shape in ((3, Shape2D(8, 16)), (3, Shape2D(4, 16)), (2, Shape2D(4, 16)))
    )
    eight = ActivationScheme()
    pieces = [RankWeight(one, None), RankWeight(two, None), RankWeight(other, None)]
    joined = merged(pieces)
    assert [tuple(piece.weight.shape) for piece in joined] == [(12, 16), (4, 16)]
    assert torch.equal(dense(joined[0].weight), torch.cat([dense(one), dense(two)]))
    assert len(merged([RankWeight(one, None), RankWeight(two, eight)])) == 2
    along_outputs = WeightScheme(num_bits=3, group_size=16, group_dim="out_features")
    cut = [random_tensor("affine", along_outputs, Shape2D(8, 16), seed) for seed in (0, 1)]
    assert len(merged([RankWeight(tensor, None) for tensor in cut])) == 2


def test_the_loaders_memory_is_not_kept():
    tensor = random_tensor("affine", EIGHT, Shape2D(8, 16), 0)
    expected, source = dense(tensor), stored("l.q_proj", tensor)
    pieces = received([source], wanted_of([source], [8], [8], 16, Rank()), [tensor])
    for part in tensor.parts.values():
        part.zero_()
    assert torch.equal(dense(pieces[0].weight), expected)


@pytest.mark.parametrize(
    ("part", "change", "match"),
    [
        ("codes", lambda t: t[:1], "its scheme needs int32"),
        ("scales", lambda t: t.float(), "its scheme needs float16"),
        ("scales", lambda t: t * float("nan"), "finite ones"),
        ("bit_planes", lambda _: torch.zeros(1), "is no part of a layer"),
    ],
)
def test_tensors_are_held_against_the_manifest(part, change, match):
    tensor = random_tensor("affine", EIGHT, Shape2D(8, 16), 0)
    source = stored("l.q_proj", tensor)
    incoming = Incoming([source], wanted_of([source], [8], [8], 16, Rank()), CPU)
    with pytest.raises(CheckpointError, match=match):
        incoming.add(0, part, change(tensor.parts.get(part)))


def test_missing_tensors_are_named():
    tensor = random_tensor("affine", EIGHT, Shape2D(8, 16), 0)
    source = stored("l.q_proj", tensor)
    incoming = Incoming([source], wanted_of([source], [8], [8], 16, Rank()), CPU)
    incoming.add(0, "codes", tensor.parts["codes"])
    with pytest.raises(CheckpointError, match=r"lacks l\.q_proj\.scales, l\.q_proj\.zero_points"):
        incoming.pieces()


def test_a_group_that_would_be_cut_is_a_sentence():
    tensor = random_tensor("affine", WeightScheme(num_bits=4, group_size=32), Shape2D(8, 96), 0)
    source = stored("l.down_proj", tensor)
    wanted = wanted_of([source], [8], [8], 48, Rank(1, 2))
    with pytest.raises(
        BackendError, match=r"l\.down_proj, 8 x 96, can't be .* 2 ranks: in_features"
    ):
        received([source], wanted, [tensor])


def test_names_of_vllm_are_those_of_stored_layers():
    entry = stored("x", random_tensor("affine", EIGHT, Shape2D(96, 64), 0)).entry
    packed = {"qkv_proj": ["q_proj", "k_proj"], "merged": ["merged"]}
    found = sources_of("m.0.qkv_proj", packed, {"m.0.k_proj": entry})
    assert found == (StoredLayer("m.0.q_proj", None), StoredLayer("m.0.k_proj", entry))
    assert [each.name for each in sources_of("m.0.merged", packed, {})] == ["m.0.merged"]
    assert [each.name for each in sources_of("head", {}, {})] == ["head"]
    layers = dict.fromkeys(["lm_head", "model.layers.0.up_proj", "model.embed_tokens"], entry)
    assert embedding_name(layers, (96, 64)) == "model.embed_tokens"
    assert embedding_name(layers, (96, 65)) is None


def test_parts_of_vllm_are_numbered():
    assert [source_number(each, 3) for each in ("q", "k", "v", 0, 2)] == [0, 1, 2, 0, 2]
    assert source_number(None, 1) == 0
    for wrong in (None, "x", "", 3, -1, (0, 1)):
        with pytest.raises(BackendError, match="which one isn't known"):
            source_number(wrong, 3)
    two = [StoredLayer("a", None), StoredLayer("b", None)]
    with pytest.raises(BackendError, match="3 weights of a, b"):
        wanted_of(two, [1, 1, 1], [1, 1, 1], 8, Rank())


@pytest.mark.parametrize("name", FORMATS)
def test_dummy_weights_have_the_layout(name):
    tensor = random_tensor(name, EIGHT, Shape2D(12, 32), 0)
    source = stored("l.q_proj", tensor)
    assert source.entry is not None
    parts = dummy_parts(source.entry)
    for part, spec in source.entry.layout().items():
        check_values(part, spec, parts[part])
    wanted = Wanted(columns=32, rank=Rank(), table=range(12))
    incoming = Incoming([source], [wanted], CPU)
    for part, values in parts.items():
        incoming.add(0, part, values)
    (product,) = prepare_products(incoming.pieces(), torch.bfloat16)
    assert torch.isfinite(product.rows(torch.arange(12))).all()
    assert product.rows(torch.arange(12)).dtype == torch.bfloat16


def test_dequantized_weights_on_a_card_are_warned_of_once(caplog):
    from qtool.integrations.vllm import products

    tensor = random_tensor("affine", EIGHT, Shape2D(8, 16), 0)
    for _ in range(2):
        products._warn_of_dense(tensor, torch.device("meta"))
    (record,) = caplog.records
    assert "as large here" in record.message
    assert "cuda: it needs a CUDA card" in record.message


def test_qtool_alone_imports_no_vllm():
    code = "import sys, qtool, qtool.cli.app; print('vllm' in sys.modules, 'torch' in sys.modules)"
    assert run_python(code).strip() == "False False"
