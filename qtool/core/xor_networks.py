"""Networks of XOR gates: linear maps over GF(2) that make many bits of few.

FleXOR (arXiv 2009.04126) and sequential encoding (arXiv 2105.01869) store the inputs and make the
bits of planes when a model is loaded. 32 networks run side by side, one per bit of the words.
"""

from itertools import combinations

import torch
from torch import Tensor

from qtool.core.packing import pack_bits, unpack_bits
from qtool.errors import SchemeError

TRIES = 1000


def through_network(words: Tensor, network: Tensor) -> Tensor:
    """Return the outputs of a network: of each, the XOR of the inputs that it taps.

    Args:
        words: (..., num_inputs, n) int32, the inputs of 32 n networks side by side.
        network: (num_outputs, num_inputs), what isn't zero is tapped.

    Returns:
        (..., num_outputs, n) int32.
    """
    made = words.new_zeros((*words.shape[:-2], len(network), words.shape[-1]))
    for output, taps in enumerate(network.tolist()):
        for place, is_tapped in enumerate(taps):
            if is_tapped:
                made[..., output, :] ^= words[..., place, :]
    return made


def rank(network: Tensor) -> int:
    """Return the rank over GF(2) of (num_outputs, num_inputs): so many stored bits count."""
    rows = [sum(int(bit) << place for place, bit in enumerate(row)) for row in network.tolist()]
    basis: list[int] = []
    for row in rows:
        left = row
        for each in basis:  # each has a highest bit that no other has
            left = min(left, left ^ each)
        if left:
            basis = [min(each, each ^ left) if _clears(each, left) else each for each in basis]
            basis.append(left)
    return len(basis)


def _clears(each: int, left: int) -> bool:
    return bool(each >> (left.bit_length() - 1) & 1)


def tapped_network(
    num_outputs: int, num_inputs: int, taps: int, generator: torch.Generator
) -> Tensor:
    """Return a random network whose outputs tap few inputs each, and that wastes no stored bit.

    FleXOR has two taps per output. Then flipping all inputs changes nothing, and one bit of each
    slice says nothing; here one output has a tap fewer where `taps` is even.

    Args:
        num_outputs: N_out, bits of a slice.
        num_inputs: N_in, stored bits of a slice.
        taps: Inputs per output, 1 to num_inputs.
        generator: Draws it.

    Returns:
        (num_outputs, num_inputs) uint8 of rank num_inputs.

    Raises:
        SchemeError: a network like that wasn't found.
    """
    for _ in range(TRIES):
        network = _drawn(num_outputs, num_inputs, taps, generator)
        if rank(network) == num_inputs:
            return network
    raise SchemeError(
        f"No network of {num_outputs} outputs with {taps} taps into {num_inputs} inputs keeps all "
        "stored bits apart. Take two taps, or fewer inputs."
    )


def _drawn(num_outputs: int, num_inputs: int, taps: int, generator: torch.Generator) -> Tensor:
    network = torch.zeros(num_outputs, num_inputs, dtype=torch.uint8)
    mixed = torch.randperm(num_inputs, generator=generator).tolist()
    first = [mixed[: max(1, taps - 1)] if taps % 2 == 0 else mixed[:taps]]
    if taps == 2:  # noqa: PLR2004 - a tree over the inputs ties them all together
        for place in range(1, num_inputs):
            earlier = int(torch.randint(place, (), generator=generator))
            first.append([mixed[place], mixed[earlier]])
    chosen = first + _others(num_outputs - len(first), num_inputs, taps, generator)
    order = torch.randperm(num_outputs, generator=generator).tolist()
    for output, inputs in zip(order, chosen, strict=True):
        network[output, inputs] = 1
    return network


def _others(count: int, num_inputs: int, taps: int, generator: torch.Generator) -> list[list[int]]:
    """Return sets of inputs, none twice before all of pairs have been there once."""
    if taps != 2:  # noqa: PLR2004 - there are too many
        draw = (torch.randperm(num_inputs, generator=generator)[:taps] for _ in range(count))
        return [inputs.tolist() for inputs in draw]
    pairs = [list(pair) for pair in combinations(range(num_inputs), 2)] or [[0]]
    found: list[list[int]] = []
    while len(found) < count:
        found += [pairs[at] for at in torch.randperm(len(pairs), generator=generator).tolist()]
    return found[:count]


def pack_network(network: Tensor) -> Tensor:
    """Return a network as it is stored, (..., num_outputs, words) int32."""
    return pack_bits(network)


def unpack_network(words: Tensor, num_inputs: int) -> Tensor:
    """Invert `pack_network`: (..., num_outputs, num_inputs) uint8."""
    return unpack_bits(words, num_inputs)


def nearest_inputs(wanted: Tensor, network: Tensor) -> Tensor:
    """Return the inputs whose outputs agree best with signs, weighed by their size.

    Args:
        wanted: (num_outputs, slices) float32: what is above zero wants a one, below it a zero, the
            more the larger.
        network: (num_outputs, num_inputs) uint8, num_inputs 16 at most: all inputs are tried.

    Returns:
        (num_inputs, slices) uint8.
    """
    num_inputs = network.shape[1]
    every = torch.arange(2**num_inputs)
    bits = ((every >> torch.arange(num_inputs)[:, None]) & 1).to(torch.float32)
    signs = (network.to(torch.float32) @ bits).remainder(2).mul(2).sub(1)  # (outputs, inputs)
    chunk = max(1, 2**24 // len(every))
    best = [(part.T @ signs).argmax(1) for part in wanted.float().split(chunk, dim=1)]
    return ((torch.cat(best) >> torch.arange(num_inputs)[:, None]) & 1).to(torch.uint8)
