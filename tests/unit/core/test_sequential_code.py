"""Decoders with shift registers: the search finds the best, and more registers find better."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.core import sequential_code
from qtool.core.packing import pack_bits, unpack_bits
from qtool.core.place_codes import decode_places, encode_places
from qtool.core.sequential_code import decoded, encoded, serial_network
from qtool.core.xor_networks import pack_network, rank
from qtool.errors import SchemeError
from tests.golden.oracles import sequential


def network_of(outputs: int, inputs: int, registers: int, seed: int = 0) -> torch.Tensor:
    return serial_network(outputs, inputs, registers, torch.Generator().manual_seed(seed))


def task(words: int, sparsity: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return words, and which of their bits matter."""
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randint(-(2**31), 2**31, (words,), generator=generator).to(torch.int32)
    kept = torch.rand(words, 32, generator=generator) >= sparsity
    return wanted, pack_bits(kept).squeeze(-1)


def wrong_bits(
    words: torch.Tensor, network: torch.Tensor, wanted: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    """Return how many bits that matter are wrong, by lane."""
    given_words = decoded(words, network).flatten()[: len(wanted)]
    return unpack_bits(((given_words ^ wanted) & kept)[:, None], 32).sum(0)


@settings(max_examples=20)
@given(
    inputs=st.integers(1, 4),
    more=st.integers(0, 6),
    registers=st.integers(2, 3),
    words=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_fast_decoder_gives_what_one_goes_through_clock_by_clock(
    inputs, more, registers, words, seed
):
    network = network_of(inputs + more, inputs, registers, seed)
    steps = sequential_code.num_steps(words, inputs + more)
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randint(-(2**31), 2**31, (inputs, steps), generator=generator).to(torch.int32)
    fast = unpack_bits(decoded(stored, network)[..., None], 32)
    by_age = pack_network(network.unflatten(1, (-1, inputs)).transpose(0, 1))
    assert fast.permute(2, 0, 1).tolist() == sequential(stored.numpy(), by_age.numpy())


@pytest.mark.parametrize(("outputs", "inputs", "registers"), [(3, 1, 2), (5, 2, 1), (2, 1, 3)])
def test_search_is_as_good_as_trying_all_words(outputs, inputs, registers):
    """Of two lanes: what the second one takes first still hangs on the first one's end."""
    network = network_of(outputs, inputs, registers)
    steps = 6 // inputs
    wanted, kept = task(outputs * steps, 0.4, 1)
    kept &= 3
    found = wrong_bits(encoded(wanted, kept, network, inputs), network, wanted, kept).sum()
    every = torch.tensor(list(itertools.product((0, 1), repeat=12)), dtype=torch.int32)
    both = every.view(-1, 2, steps, inputs)
    words = both[:, 0] | both[:, 1] << 1
    assert found == min(
        int(wrong_bits(stored.T.contiguous(), network, wanted, kept).sum()) for stored in words
    )


def test_windows_change_next_to_nothing(monkeypatch):
    network = network_of(10, 3, 2)
    wanted, kept = task(1000, 0.7, 2)
    monkeypatch.setattr(sequential_code, "WINDOW", 2**20)
    whole = wrong_bits(encoded(wanted, kept, network, 3), network, wanted, kept).sum()
    monkeypatch.setattr(sequential_code, "WINDOW", 50)  # parts side by side, too
    cut = wrong_bits(encoded(wanted, kept, network, 3), network, wanted, kept).sum()
    assert whole <= cut <= 1.02 * whole


def test_more_registers_leave_fewer_bits_wrong_down_to_a_hundredth():
    wanted, kept = task(600, 0.7, 3)
    wrong = [
        int(wrong_bits(encoded(wanted, kept, net, 3), net, wanted, kept).sum())
        for net in (network_of(10, 3, registers) for registers in (1, 2, 3))
    ]
    assert wrong == sorted(wrong, reverse=True)
    assert wrong[-1] < 0.02 * int(unpack_bits(kept[:, None], 32).sum())


def test_a_network_that_wastes_nothing_gives_all_bits_that_it_is_given_room_for():
    network = network_of(4, 4, 2)
    assert rank(network[:, :4]) == 4
    wanted, kept = task(50, 0.0, 4)
    assert not wrong_bits(encoded(wanted, kept, network, 4), network, wanted, kept).any()


def test_every_output_sees_the_newest_and_the_oldest_bit_of_its_turn():
    network = network_of(10, 3, 2).numpy()
    turns = [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    serial = np.concatenate([network[:, 3 * k : 3 * k + 3] for k in (2, 1, 0)], 1)  # oldest first
    for row, turn in zip(serial, turns, strict=True):
        seen = row.nonzero()[0]
        assert (seen[0], seen[-1]) == (turn, turn + 6)


@pytest.mark.parametrize(("inputs", "registers"), [(1, 1), (7, 3), (1, 19)])
def test_registers_that_hold_too_little_or_too_much_are_refused(inputs, registers):
    with pytest.raises(SchemeError, match="Take other registers"):
        network_of(8, inputs, registers)
    with pytest.raises(SchemeError, match="Take more inputs"):
        network_of(300, 2, 3)


@given(limit=st.integers(1, 3000), data=st.data())
def test_places_come_back(limit, data):
    places = sorted(data.draw(st.lists(st.integers(0, limit - 1), min_size=1, max_size=60)))
    lows, unary = encode_places(torch.tensor(places), limit)
    assert decode_places(lows, unary, len(places), limit).tolist() == places
