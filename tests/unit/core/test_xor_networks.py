"""Networks of XOR gates: what they make, that no stored bit is wasted, the nearest inputs."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.core.packing import pack_bits, unpack_bits
from qtool.core.xor_networks import nearest_inputs, rank, tapped_network, through_network
from qtool.errors import SchemeError


def drawn(outputs: int, inputs: int, taps: int, seed: int = 0) -> torch.Tensor:
    return tapped_network(outputs, inputs, taps, torch.Generator().manual_seed(seed))


def every_input(count: int) -> torch.Tensor:
    """Return all inputs of a network as columns, (count, 2^count)."""
    return torch.tensor(list(itertools.product((0, 1), repeat=count)), dtype=torch.uint8).T


@given(inputs=st.integers(1, 8), more=st.integers(0, 12), seed=st.integers(0, 1000))
def test_bits_are_products_of_signs_but_for_a_sign_and_tell_all_inputs_apart(inputs, more, seed):
    network = drawn(inputs + more, inputs, min(2, inputs), seed)
    bits = every_input(inputs)
    made = unpack_bits(through_network(pack_bits(bits), network), bits.shape[1])
    signs = bits.double() * 2 - 1
    for taps, row in zip(network.bool(), made, strict=True):
        product = signs[taps].prod(0) * (-1) ** (int(taps.sum()) - 1)
        assert torch.equal(row.double() * 2 - 1, product)
    assert rank(network) == inputs
    assert len(made.T.unique(dim=0)) == 2**inputs


def test_two_taps_everywhere_would_waste_a_bit_so_one_output_has_one():
    network = drawn(20, 8, 2)
    assert sorted(network.sum(1).tolist()) == [1] + [2] * 19
    single = int(network.sum(1).argmin())
    network[single, (network[single] == 0).nonzero()[0]] = 1
    assert rank(network) == 7


@pytest.mark.parametrize("taps", [1, 3, 4])
def test_other_numbers_of_taps_keep_inputs_apart_or_are_refused(taps):
    outputs = 6 if taps == 1 else 20
    network = drawn(outputs, 6, taps)
    assert rank(network) == 6
    assert int(network.sum(1).max()) == taps
    with pytest.raises(SchemeError, match="No network of 3 outputs"):
        drawn(3, 6, taps)


@given(inputs=st.integers(1, 6), more=st.integers(0, 6), seed=st.integers(0, 1000))
def test_nearest_inputs_are_the_best_of_all(inputs, more, seed):
    network = drawn(inputs + more, inputs, min(2, inputs), seed)
    wanted = torch.randn(inputs + more, 5, generator=torch.Generator().manual_seed(seed))
    found = nearest_inputs(wanted, network)

    def agreement(bits: torch.Tensor) -> torch.Tensor:
        return (network.double() @ bits.double() % 2 * 2 - 1).T @ wanted.double()

    best = agreement(every_input(inputs)).amax(0)
    torch.testing.assert_close(agreement(found).diagonal(), best, rtol=1e-5, atol=1e-5)
