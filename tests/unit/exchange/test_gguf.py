"""GGUF files: blocks to the bit, names and orders, and what is wrong in one sentence."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.checkpoint.manifest import LayerEntry, codec
from qtool.errors import CheckpointError
from qtool.exchange._gguf_blocks import DECODERS, decode_blocks
from qtool.exchange._gguf_encode import encode, type_of, why_no_type
from qtool.exchange._gguf_file import GGML_TYPES, open_gguf
from qtool.exchange._gguf_names import to_halves, to_pairs
from qtool.exchange._gguf_read import names_of, readers
from qtool.formats import minima, nested
from qtool.formats.affine import encode_affine
from qtool.formats.binary_coding import CODEC as BINARY
from qtool.scheme import Shape2D, WeightScheme
from tests.robustness.gguf_files import write_gguf

gguf = pytest.importorskip("gguf")
KINDS = {kind.name: kind for kind in GGML_TYPES.values()}
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}
"""Where float16 numbers are in a block; elsewhere at its beginning."""


def random_rows(name: str, rows: int, blocks: int, seed: int) -> torch.Tensor:
    """Return blocks of arbitrary bits whose float16 numbers are finite, of either sign."""
    draw, size = np.random.default_rng(seed), KINDS[name].block_bytes
    raw = draw.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    pair = name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")
    for at in HALVES.get(name, (0, 2) if pair else (0,)):
        halves = draw.normal(size=(rows, blocks)).astype(np.float16)
        halves[draw.random((rows, blocks)) < 0.1] = 0
        raw[..., at : at + 2] = halves[..., None].view(np.uint8)
    return torch.from_numpy(raw.reshape(rows, -1))


def dequantized_by_gguf(rows: torch.Tensor, name: str) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType[name]
    return torch.from_numpy(gguf.quants.dequantize(rows.numpy(), kind))


def dequantized(tensor):
    return codec(tensor.format).dequantize(tensor, torch.float32)


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 70), blocks=st.integers(1, 3), seed=st.integers(0, 9999))
def test_blocks_mean_what_gguf_says_to_the_bit(name, rows, blocks, seed):
    raw = random_rows(name, rows, blocks, seed)
    tensor = decode_blocks(raw, KINDS[name])
    assert torch.equal(dequantized(tensor), dequantized_by_gguf(raw, name))


@pytest.mark.parametrize("name", DECODERS)
def test_a_weight_decoded_in_parts_is_the_same(name, monkeypatch):
    raw = random_rows(name, 100, 2, 3)
    whole = dequantized(decode_blocks(raw, KINDS[name]))
    monkeypatch.setattr("qtool.exchange._gguf_blocks.DECODED_AT_ONCE", 1)
    assert torch.equal(dequantized(decode_blocks(raw, KINDS[name])), whole)


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_blocks_are_made_again_byte_by_byte_and_are_binary_coded(name):
    raw = random_rows(name, 9, 2, 1)
    tensor = decode_blocks(raw, KINDS[name])
    entry = LayerEntry(format=tensor.format, scheme=tensor.scheme, shape=tensor.shape, method="")
    assert (why_no_type(entry), type_of(entry)) == (None, name)
    assert torch.equal(encode(tensor, name), raw)
    is_nested = tensor.format == nested.NESTED
    planes = (nested.nested_to_binary if is_nested else minima.minima_to_binary)(tensor)
    assert bool((planes.parts["plane_scales"] >= 0).all())
    close = BINARY.dequantize(planes, torch.float64).float()
    torch.testing.assert_close(close, dequantized(tensor), rtol=1e-6, atol=1e-5)


@settings(max_examples=150, deadline=None)
@given(
    num_bits=st.integers(1, 8),
    symmetric=st.booleans(),
    group_size=st.sampled_from([16, 32, 48, 64, 128, 256, 512, None]),
    inputs=st.sampled_from([96, 256, 320, 512, 768]),
    seed=st.integers(0, 9999),
)
def test_affine_weights_are_blocks_to_the_bit_or_refused(
    num_bits, symmetric, group_size, inputs, seed
):
    num_bits = max(num_bits, 1 + symmetric)
    scheme = WeightScheme(num_bits=num_bits, group_size=group_size, symmetric=symmetric)
    shape, generator = Shape2D(5, inputs), torch.Generator().manual_seed(seed)
    entry = LayerEntry(format="affine", scheme=scheme, shape=shape, method="")
    if (reason := why_no_type(entry)) is not None:
        assert group_size in (16, 48) or (num_bits == 8 and not symmetric), reason
        return
    groups, size = scheme.num_groups(shape), min(group_size or inputs, inputs)
    codes = torch.randint(2**num_bits, (5, groups, size), generator=generator).to(torch.uint8)
    scales = (torch.rand(5, groups, generator=generator) + 1e-6).half()
    zeros = torch.randint(2**num_bits, (5, groups), generator=generator).to(torch.uint8)
    tensor = encode_affine(codes, scales, zeros, scheme, shape)
    name = type_of(entry)
    assert torch.equal(dequantized_by_gguf(encode(tensor, name), name), dequantized(tensor))


def test_an_infinite_scale_is_refused():
    raw = random_rows("Q4_K", 2, 1, 0)
    raw[1, :2] = torch.tensor([0, 124], dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="isn't finite"):
        decode_blocks(raw, KINDS["Q4_K"])


def test_order_of_rows_and_back():
    there, back = to_halves(24, 3), to_pairs(24, 3)
    assert torch.equal(there[back], torch.arange(24))
    assert there[:8].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    return path


def test_tensors_have_the_names_and_values_that_transformers_gives_them(file):
    import transformers

    opened = open_gguf(file)
    layers, others, tied = readers(opened, names_of(opened))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    expected = model.state_dict()
    assert not layers
    assert not tied
    assert others.keys() == expected.keys()
    for name, read in others.items():
        assert torch.equal(read().float(), expected[name]), name


def test_a_file_cut_anywhere_is_one_sentence(file):
    content = file.read_bytes()
    for length in [0, 3, 7, 20, 60, 500, len(content) // 2, len(content) - 2000]:
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError) as caught:
            open_gguf(file)
        assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 3000), value=st.integers(0, 255))
def test_a_changed_byte_of_the_header_is_read_or_refused(at, value, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    if not path.exists():
        write_gguf(path)
    content = bytearray(path.read_bytes())
    content[at] = value
    changed = path.with_name("other.gguf")
    changed.write_bytes(content)
    try:
        opened = open_gguf(changed)
        readers(opened, names_of(opened))
    except CheckpointError as error:
        assert "\n" not in str(error)


def changed(file, old: bytes, new: bytes) -> str:
    content = file.read_bytes()
    assert content.count(old) >= 1
    file.write_bytes(content.replace(old, new, 1))
    with pytest.raises(CheckpointError) as caught:
        opened = open_gguf(file)
        readers(opened, names_of(opened))
    return str(caught.value)


def info(name: str, shape: tuple[int, ...], kind: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return name.encode() + dims + struct.pack("<I", kind)


def test_what_is_wrong_is_said_with_tensor_and_type(file):
    content, ffn = file.read_bytes(), "blk.0.ffn_up.weight"
    plain = info(ffn, (96, 64), 1)
    assert f"{ffn} is of type IQ4_XS" in changed(file, plain, info(ffn, (96, 64), 23))
    file.write_bytes(content)
    assert "whole blocks of 256" in changed(file, plain, info(ffn, (96, 64), 12))
    file.write_bytes(content)
    assert "and the metadata say (96, 64)" in changed(file, plain, info(ffn, (64, 96), 1))
    file.write_bytes(content)
    assert "would end at byte" in changed(file, plain, info(ffn, (9999, 64), 1))
    file.write_bytes(content)
    assert "has blk.0.ffn_xx.weight" in changed(
        file, b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"
    )
    file.write_bytes(content)
    assert "no GGUF file" in changed(file, b"GGUF", b"GGUX")
    file.write_bytes(content)
    assert "of lama3" in changed(file, b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0lama3")
