from hashlib import sha256

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.checkpoint.reader import tensor_digest
from qtool.core.packing import (
    codes_to_planes,
    num_words,
    octets_of,
    pack_bits,
    planes_to_codes,
    unpack_bits,
)

lengths = st.integers(1, 130)
seeds = st.integers(0, 2**31)


def random_integers(high: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(high, shape, generator=generator, dtype=torch.int64).to(torch.uint8)


@given(shape=st.lists(st.integers(1, 4), max_size=3), length=lengths, seed=seeds)
def test_bits_survive_the_round_trip_for_any_shape(shape, length, seed):
    bits = random_integers(2, (*shape, length), seed)
    words = pack_bits(bits)
    assert words.dtype == torch.int32
    assert words.shape == (*shape, num_words(length))
    assert torch.equal(unpack_bits(words, length), bits)


@given(rows=st.integers(1, 5), length=lengths, num_bits=st.integers(1, 8), seed=seeds)
def test_codes_survive_the_round_trip_for_any_width(rows, length, num_bits, seed):
    codes = random_integers(2**num_bits, (rows, length), seed)
    planes = codes_to_planes(codes, num_bits)
    assert planes.shape == (num_bits, rows, num_words(length))
    assert torch.equal(planes_to_codes(planes, length), codes)


@given(length=lengths, seed=seeds)
def test_lowest_index_is_the_lowest_bit_of_the_word(length, seed):
    bits = random_integers(2, (length,), seed)
    expected = [0] * num_words(length)
    for index, bit in enumerate(bits.tolist()):
        expected[index // 32] |= bit << (index % 32)
    assert [word % 2**32 for word in pack_bits(bits).tolist()] == expected


def test_plane_0_is_the_most_significant_bit():
    planes = codes_to_planes(torch.tensor([[4, 1]], dtype=torch.uint8), 3)
    assert planes.flatten().tolist() == [0b01, 0b00, 0b10]


@given(length=lengths)
def test_padding_of_the_last_word_is_zero(length):
    word = int(pack_bits(torch.ones(length, dtype=torch.uint8))[-1]) % 2**32
    assert word == 2 ** ((length - 1) % 32 + 1) - 1


@pytest.mark.parametrize("make", [lambda x: x.T, lambda x: x[:, ::3], lambda x: x.bool()])
def test_strided_and_boolean_bits_pack_like_plain_ones(make):
    bits = make(random_integers(2, (40, 66), 0))
    assert torch.equal(pack_bits(bits), pack_bits(bits.contiguous().to(torch.uint8).clone()))


def test_strided_words_unpack_like_contiguous_ones():
    words = pack_bits(random_integers(2, (6, 64), 1))
    assert torch.equal(unpack_bits(words.T, 32), unpack_bits(words.T.contiguous(), 32))


@given(length=lengths, seed=seeds)
def test_path_of_the_card_gives_the_same_words(length, seed):
    bits = random_integers(2, (3, length), seed)
    words = pack_bits(bits)
    with pytest.MonkeyPatch.context() as patch:  # the CPU takes a shortcut through numpy
        patch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        assert torch.equal(pack_bits(bits), words)
        assert torch.equal(unpack_bits(words, length), bits)


@given(rows=st.integers(1, 3), length=st.integers(1, 3), stride=st.integers(1, 5), seed=seeds)
def test_bytes_are_those_of_the_numbers_whatever_the_strides(rows, length, stride, seed):
    wide = random_integers(256, (rows, length * stride * 2), seed).view(torch.float16)
    values = wide[:, ::stride]  # of one number the stride means nothing, and stays
    octets = octets_of(values)
    assert octets.shape == (rows, 2 * length)
    assert octets.numpy().tobytes() == values.numpy().tobytes()
    assert tensor_digest(values) == sha256(values.numpy().tobytes()).hexdigest()


def test_one_word_unpacks_whatever_its_stride():
    words = pack_bits(random_integers(2, (3, 20), seed=1))
    strided = torch.as_strided(words, (3, 1), (1, 7))
    assert torch.equal(unpack_bits(strided, 20), unpack_bits(words, 20))
