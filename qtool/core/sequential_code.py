"""Bits that a decoder with shift registers makes of few, and the search for these (Viterbi).

Sequential encryption of sparse weights (arXiv 2105.01869): at each step of a clock the decoder
takes N_in bits and gives N_out, by an XOR network that also sees the N_in bits of N_s earlier
steps. Bits of pruned weights may be anything, so N_in can be about N_out times the share of the
others. 32 decoders run side by side, one per bit of the words.

The paper's network is random. Ours takes its N_in bits one after the other, and each output sees
the newest and the oldest bit of its own N_in N_s + 1 (so is a convolutional code, punctured): fewer
wrong bits, and a search that is shorter. A decoder takes any network.
"""

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qtool.core.packing import WORD_BITS, pack_bits, unpack_bits
from qtool.core.xor_networks import through_network
from qtool.errors import SchemeError

Octets = NDArray[np.uint8]
Ways = NDArray[np.bool_]
MEMORY = range(2, 19)
"""Bits that the registers may hold: below none is left between newest and oldest."""
DEAREST = 120
"""Wrong bits beyond the fewest, from which on a state isn't told from worse ones."""
WINDOW = 1024
"""Bits that are searched at once; their ways lie in memory."""


def decoded(words: Tensor, network: Tensor) -> Tensor:
    """Return what decoders give.

    Args:
        words: (num_inputs, steps) int32: bit b of word t is what lane b takes at step t. At first
            its registers hold what lane b - 1 took last, and those of lane 0 zeros: the lanes are
            one stream.
        network: (num_outputs, num_inputs * (registers + 1)) uint8: sees the inputs of now, then
            those of a step ago, and so on.

    Returns:
        (steps, num_outputs) int32: one after the other, the words that were encoded.
    """
    registers, steps = network.shape[1] // len(words) - 1, words.shape[1]
    laps = [words << lap for lap in range(-(-registers // steps), -1, -1)]
    stream = torch.cat(laps, 1)
    first = stream.shape[1] - steps
    seen = [stream[:, first - age : first - age + steps] for age in range(registers + 1)]
    return through_network(torch.cat(seen), network).T.contiguous()


def serial_network(
    num_outputs: int, num_inputs: int, registers: int, generator: torch.Generator
) -> Tensor:
    """Return a network whose inputs come one after the other, as `encoded` takes it.

    Returns:
        (num_outputs, num_inputs * (registers + 1)) uint8.

    Raises:
        SchemeError: the registers hold too few bits, or too many to be searched.
    """
    memory, most = num_inputs * registers, -(-num_outputs // num_inputs)
    if most > DEAREST:
        raise SchemeError(
            f"{num_outputs} outputs of {num_inputs} inputs are {most} per stored bit; up to "
            f"{DEAREST} are searched. Take more inputs."
        )
    if memory not in MEMORY:
        raise SchemeError(
            f"{registers} registers of {num_inputs} bits hold {memory}; {MEMORY[0]} to "
            f"{MEMORY[-1]} are searched. Take other registers."
        )
    network = torch.zeros(num_outputs, num_inputs * (registers + 1), dtype=torch.uint8)
    for turn, (first, last) in enumerate(pairwise(_turns(num_outputs, num_inputs))):
        taps = torch.randint(2, (last - first, memory + 1), generator=generator, dtype=torch.uint8)
        taps[:, [0, -1]] = 1
        network[first:last, _columns(turn, num_inputs, memory)] = taps
    return network


def _turns(num_outputs: int, num_inputs: int) -> list[int]:
    """Return where the outputs of each input's turn begin, and where the last one's end."""
    return [num_outputs * turn // num_inputs for turn in range(num_inputs + 1)]


def _columns(turn: int, num_inputs: int, memory: int) -> list[int]:
    """Return the columns of the bits that are 0, 1, ... `memory` older than the one of a turn."""
    found = []
    for age in range(memory + 1):
        steps = -((turn - age) // num_inputs)  # back from this one
        found.append(steps * num_inputs + (turn - age) % num_inputs)
    return found


def encoded(wanted: Tensor, kept: Tensor, network: Tensor, num_inputs: int) -> Tensor:
    """Return the words from which decoders make the most of the bits that are kept.

    The best there are, but for what windows of 1024 bits, searched somewhat further, may miss.

    Args:
        wanted: (n,) int32, words whose bits the decoders shall give.
        kept: (n,) int32, ones where that matters.
        network: One that `serial_network` gives.
        num_inputs: Bits that a decoder takes at each step.

    Returns:
        (num_inputs, steps) int32.
    """
    search, size = _Search(network, num_inputs), len(network)
    missing = -len(wanted) % size
    bits, cares = (
        unpack_bits(torch.nn.functional.pad(words, (0, missing))[:, None], WORD_BITS).T.flatten()
        for words in (wanted, kept)
    )  # lane after lane
    found = search.best(bits.numpy(), cares.numpy()).reshape(WORD_BITS, -1, num_inputs)
    return pack_bits(torch.from_numpy(found).permute(2, 1, 0)).squeeze(-1)


def num_steps(num_words: int, num_outputs: int) -> int:
    """Return how many steps give so many words."""
    return -(-num_words // num_outputs)


class _Search:
    """The cheapest way through the states of the registers.

    A state is one number, its lowest bit the newest. The older of two states that lead to the same
    next ones differ in the oldest bit; newest and oldest flip all outputs, so that of what they may
    be together there are two costs.
    """

    def __init__(self, network: Tensor, num_inputs: int) -> None:
        self.memory = network.shape[1] - num_inputs
        self.turns, self.num_outputs = _turns(len(network), num_inputs), len(network)
        self.most_outputs = max(last - first for first, last in pairwise(self.turns))
        between = np.arange(2 ** (self.memory - 1))
        self.outputs: list[tuple[Octets, Octets]] = []  # wrong where a 0, where a 1 is wanted
        self.turn_of: list[int] = []  # by output
        for turn, (first, last) in enumerate(pairwise(self.turns)):
            self.turn_of += [turn] * (last - first)
            columns = _columns(turn, num_inputs, self.memory)[1:-1]
            for taps in network[first:last, columns].numpy():
                made = np.zeros(between.shape, np.uint8)
                for at in taps.nonzero()[0]:
                    made ^= (between >> at).astype(np.uint8) & 1
                self.outputs.append((made, made ^ np.uint8(1)))

    def best(self, bits: Octets, cares: Octets) -> Octets:
        """Return the bits that are taken, one per turn."""
        size, per_step = self.num_outputs, len(self.turns) - 1
        steps, ahead = len(bits) // size, 1 + 12 * self.memory // per_step
        window = max(1, WINDOW // per_step)
        found, start, state = [], 0, 0
        while start < steps:
            end = steps if start + window + ahead >= steps else start + window
            part = slice(start * size, (end + ahead) * size)
            costs = np.full(2**self.memory, DEAREST, np.uint8)
            costs[state] = 0
            ways, costs = self._forward(costs, self._by_turn(bits[part], cares[part]))
            taken = self._back(ways, int(costs.argmin()))[: (end - start) * per_step]
            for bit in taken[-self.memory :]:
                state = (2 * state + bit) % 2**self.memory
            found += taken
            start = end
        return np.array(found, np.uint8)

    def _by_turn(self, bits: Octets, cares: Octets) -> list[list[Octets]]:
        """Return of each turn what is wrong by state, one array per output that matters."""
        per_step = len(self.turns) - 1
        wrong: list[list[Octets]] = [[] for _ in range(len(bits) // self.num_outputs * per_step)]
        for at in cares.nonzero()[0].tolist():
            step, output = divmod(at, self.num_outputs)
            wrong[step * per_step + self.turn_of[output]].append(self.outputs[output][bits[at]])
        return wrong

    def _forward(self, costs: Octets, wrong: list[list[Octets]]) -> tuple[list[Ways], Octets]:
        """Return of each turn the oldest bit that is best before a 0 and before a 1, by state."""
        half, ways, often = len(costs) // 2, [], max(1, DEAREST // self.most_outputs)
        some, others, stay, come = (np.empty(half, np.uint8) for _ in range(4))
        pairs, spare, wide = (np.empty(half, np.uint16) for _ in range(3))
        for turn, arrays in enumerate(wrong):
            young, old, way = costs[:half], costs[half:], np.empty((2, half), np.bool_)
            _added(arrays, some)
            np.subtract(len(arrays), some, out=others)
            np.add(young, others, out=stay)
            np.add(old, some, out=come)
            np.less(come, stay, out=way[1])
            pairs[:] = np.minimum(stay, come, out=stay)
            np.multiply(pairs, 256, out=pairs)  # shifts aren't vectorized
            np.add(young, some, out=stay)
            np.add(old, others, out=come)
            np.less(come, stay, out=way[0])
            wide[:] = np.minimum(stay, come, out=stay)
            np.add(pairs, wide, out=pairs)
            ways.append(way)
            costs = pairs.view(np.uint8)  # of next states: before a 0, before a 1
            pairs, spare = spare, pairs  # the costs lie in one of the two
            if turn % often == 0:
                costs -= costs.min()
                np.minimum(costs, DEAREST, out=costs)
        return ways, costs

    def _back(self, ways: list[Ways], state: int) -> list[int]:
        """Follow ways back from a state, and return the bits that were taken."""
        taken = []
        for way in reversed(ways):
            newest, between = state & 1, state >> 1
            taken.append(newest)
            state = int(way[newest, between]) << (self.memory - 1) | between
        return taken[::-1]


def _added(arrays: list[Octets], out: Octets) -> None:
    """Write the sum of arrays."""
    if len(arrays) > 1:
        np.add(arrays[0], arrays[1], out=out)
    else:
        out[:] = arrays[0] if arrays else 0
    for each in arrays[2:]:
        out += each
