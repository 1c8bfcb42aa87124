"""Layers that the peers' own libraries have packed mean what these decode them to."""

import pytest
import torch

from qtool.checkpoint.manifest import LayerEntry
from qtool.exchange import exchange_of, load_exchange
from qtool.exchange._ct_writing import packed_ct
from qtool.exchange._gptq_writing import packed_layer
from qtool.exchange._words import pack_words, unpack_words
from tests.helpers import dequantized
from tests.unit.exchange.foreign import AWQ, GPTQ, LAYER, cases, ct, directory, vectors


def section_of(case):
    kind, bits, *rest = case.split("-")
    if kind == "gptq":
        name = "gptq" if rest == ["v1"] else "gptq_v2"
        return {**GPTQ, "bits": int(bits), "checkpoint_format": name}
    return AWQ if kind == "awq" else ct(int(bits), symmetric=rest == ["sym"])


def loaded(path):
    name = exchange_of(path)
    assert name is not None
    read = load_exchange(name).read
    assert read is not None
    model = read(path)
    assert list(model.layers) == [LAYER]
    assert not model.others
    return model.layers[LAYER]()


@pytest.mark.parametrize("case", cases())
def test_what_a_peer_has_packed_means_what_it_decodes(case, tmp_path):
    parts = vectors(case)
    decoded = parts.pop("decoded")
    tensor = loaded(directory(tmp_path / "m", parts, section_of(case)))
    assert torch.equal(dequantized(tensor), decoded)


def test_awq_is_read_under_the_names_of_its_own_old_record(tmp_path):
    parts = vectors("awq-4")
    decoded = parts.pop("decoded")
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 16, "version": "GEMM"}
    tensor = loaded(directory(tmp_path / "m", parts, old))
    assert torch.equal(dequantized(tensor), decoded)


@pytest.mark.parametrize("case", [case for case in cases() if not case.startswith("awq")])
def test_what_was_read_is_written_as_the_peer_wrote_it(case, tmp_path):
    parts = vectors(case)
    del parts["decoded"]
    tensor = loaded(directory(tmp_path / "m", parts, section_of(case)))
    if case.startswith("gptq"):
        written = packed_layer("x", tensor, 1 if case.endswith("v1") else 2)
    else:
        entry = LayerEntry(
            format=tensor.format, scheme=tensor.scheme, shape=tensor.shape, method="x"
        )
        written = packed_ct("x", tensor, entry)
    assert written.keys() == {f"x.{name}" for name in parts}
    for name, part in parts.items():
        assert torch.equal(written[f"x.{name}"], part), name


@pytest.mark.parametrize(
    ("num_bits", "codes", "words"),
    [
        (4, list(range(8)), "76543210"),
        (2, [0, 1, 2, 3] * 4, "e4e4e4e4"),
        (3, [code % 8 for code in range(32)], "88fac688 c688fac6 fac688fa"),
        (8, [0x10, 0x32, 0x54, 0x76], "76543210"),
    ],
)
def test_words_of_codes(num_bits, codes, words):
    numbers = torch.tensor([codes], dtype=torch.uint8)
    packed = pack_words(numbers, num_bits)
    assert " ".join(f"{word & 0xFFFFFFFF:08x}" for word in packed[0].tolist()) == words
    assert torch.equal(unpack_words(packed, num_bits, len(codes)), numbers)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_codes_of_older_versions_begin_new_words(bits, tmp_path):
    codes = torch.randint(0, 2**bits, (32, 64), generator=torch.Generator().manual_seed(bits))
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -64 % per_word)).unflatten(1, (-1, per_word))
    words = (padded << (bits * torch.arange(per_word))).sum(-1).to(torch.int32)
    parts = {
        "weight_packed": words,
        "weight_scale": torch.ones(32, 4).half(),
        "weight_shape": torch.tensor([32, 64]),
    }
    tensor = loaded(directory(tmp_path / "m", parts, ct(bits, symmetric=True)))
    assert torch.equal(dequantized(tensor), (codes - 2 ** (bits - 1)).float())


def test_scales_below_zero_mirror_the_codes(tmp_path):
    parts = vectors("gptq-4-v2")
    decoded = parts.pop("decoded")
    parts["scales"][1] *= -1
    tensor = loaded(directory(tmp_path / "m", parts, {**GPTQ, "checkpoint_format": "gptq_v2"}))
    expected = torch.where(parts["g_idx"] == 1, -decoded, decoded)
    assert torch.equal(dequantized(tensor), expected)
    assert not tensor.scheme.symmetric
    assert float(tensor.parts["scales"].min()) > 0


def test_bytes_with_a_scale_per_row_or_tensor(tmp_path):
    weight = torch.randint(-128, 128, (8, 6), dtype=torch.int8)
    section = ct(8, symmetric=True, strategy="channel", group_size=None)
    section["format"] = "int-quantized"
    scales = torch.rand(8, 1).half()
    path = directory(tmp_path / "m", {"weight": weight, "weight_scale": scales}, section)
    assert torch.equal(dequantized(loaded(path)), weight.float() * scales.float())
    section = ct(8, symmetric=True, strategy="tensor", group_size=None)
    section["format"] = "naive-quantized"
    one = torch.tensor([0.25]).bfloat16()
    path = directory(tmp_path / "n", {"weight": weight, "weight_scale": one}, section)
    assert torch.equal(dequantized(loaded(path)), weight.float() / 4)
