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
Numbers = NDArray[np.intp]
MEMORY = range(2, 19)
"""Bits that the registers may hold: below none is left between newest and oldest."""
DEAREST = 120
"""Wrong bits beyond the fewest, from which on a state isn't told from worse ones."""
WINDOW = 1024
"""Bits that are searched at once; their ways lie in memory."""
MOST_LANES, LANE_STATES = 128, 2**16
"""Parts of a long stream are searched side by side, of so many states in all: calls on short arrays
would take all the time."""
ANYTHING = 2
"""What is wanted of a bit that doesn't matter."""


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
        self.outputs: list[list[Octets]] = []
        """By turn and output (3, states): what is wrong where a 0, a 1, anything is wanted."""
        for turn, (first, last) in enumerate(pairwise(self.turns)):
            columns, tables = _columns(turn, num_inputs, self.memory)[1:-1], []
            for taps in network[first:last, columns].numpy():
                made = np.zeros(between.shape, np.uint8)
                for at in taps.nonzero()[0]:
                    made ^= (between >> at).astype(np.uint8) & 1
                tables.append(np.stack([made, made ^ np.uint8(1), np.zeros_like(made)]))
            self.outputs.append(tables)

    def best(self, bits: Octets, cares: Octets) -> Octets:
        """Return the bits that are taken, one per turn."""
        per_step, steps = len(self.turns) - 1, len(bits) // self.num_outputs
        ahead = 1 + 12 * self.memory // per_step
        shortest = max(WINDOW // per_step, 4 * ahead)  # places where lanes meet stay apart
        lanes = max(1, min(MOST_LANES, LANE_STATES >> self.memory, steps // shortest))
        if self.num_outputs <= per_step:  # each bit decides an input, so that ways never meet
            lanes = 1
        length = -(-steps // lanes)
        before = ahead if lanes > 1 else 0
        after = lanes * length - steps + before
        wanted = np.where(cares > 0, bits, ANYTHING).reshape(steps, self.num_outputs)
        wanted = np.pad(wanted, ((before, after), (0, 0)), constant_values=ANYTHING)
        by_lane = _beside(wanted, np.arange(lanes) * length, length + 2 * before)
        costs = np.zeros((lanes, 2**self.memory), np.uint8)
        if before:  # what comes before says in which state a part may begin
            costs = self._forward(costs, by_lane[:before])[1]
        costs[0] = DEAREST
        costs[0, 0] = 0
        stream = self._taken(by_lane[before:], costs, length, ahead).T.reshape(-1)
        if lanes > 1:
            meets = np.arange(1, lanes) * length
            self._mend(stream, _beside(wanted, before + meets - ahead, 2 * ahead), meets - ahead)
        return stream[: steps * per_step]

    def _mend(self, stream: Octets, wanted: Numbers, steps: Numbers) -> None:
        """Search again where lanes meet, from a state of the one to a state of the next.

        Args:
            stream: (turns,), changed in place.
            wanted: (steps, num_outputs, lanes), around these places.
            steps: (lanes,), where that begins.
        """
        per_step, ages = len(self.turns) - 1, np.arange(self.memory)
        first, count = steps * per_step, len(wanted) * per_step
        begun, ended = (
            (stream[turn[:, None] - 1 - ages].astype(np.intp) << ages).sum(1)
            for turn in (first, first + count)
        )
        costs = np.full((len(steps), 2**self.memory), DEAREST, np.uint8)
        costs[np.arange(len(steps)), begun] = 0
        ways = self._forward(costs, wanted)[0]
        stream[first + np.arange(count)[:, None]] = self._back(ways, ended)

    def _taken(self, wanted: Numbers, costs: Octets, steps: int, ahead: int) -> Octets:
        """Return the bits of so many steps of each lane, (turns, lanes).

        Args:
            wanted: (steps and some that follow, num_outputs, lanes): 0, 1, or 2 for anything.
            costs: (lanes, states), of where each begins.
            steps: That are asked for.
            ahead: Steps that are looked at beyond a window.
        """
        per_step, start, found = len(self.turns) - 1, 0, []
        window, state = max(1, WINDOW // per_step), np.zeros(len(costs), np.intp)
        while start < steps:
            end = steps if start + window + ahead >= steps else start + window
            ways, last = self._forward(costs, wanted[start : end + ahead])
            taken = self._back(ways, last.argmin(1))[: (end - start) * per_step]
            for bits in taken[-self.memory :]:
                state = (2 * state + bits) % 2**self.memory
            costs = np.full_like(costs, DEAREST)
            costs[np.arange(len(costs)), state] = 0
            found.append(taken)
            start = end
        return np.concatenate(found)

    def _forward(self, costs: Octets, wanted: Numbers) -> tuple[list[Ways], Octets]:
        """Return of each turn the oldest bit that is best before a 0 and before a 1, by state."""
        lanes, half = len(costs), costs.shape[1] // 2
        ways, often = list[Ways](), max(1, DEAREST // self.most_outputs)
        some, others, stay, come, spare = (np.empty((lanes, half), np.uint8) for _ in range(5))
        pairs, next_pairs, wide = (np.empty((lanes, half), np.uint16) for _ in range(3))
        for turn in range(len(wanted) * (len(self.turns) - 1)):
            number = self._wrong(wanted, turn, some, spare)
            young, old, way = costs[:, :half], costs[:, half:], np.empty((2, lanes, half), np.bool_)
            np.subtract(number, some, out=others)
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
            pairs, next_pairs = next_pairs, pairs  # the costs lie in one of the two
            if turn % often == 0:
                costs -= costs.min(1, keepdims=True)
                np.minimum(costs, DEAREST, out=costs)
        return ways, costs

    def _wrong(self, wanted: Numbers, turn: int, out: Octets, spare: Octets) -> Octets:
        """Write how many outputs of a turn are wrong, by lane and state; return how many count."""
        step, place = divmod(turn, len(self.turns) - 1)
        asked = wanted[step, self.turns[place] : self.turns[place + 1]]
        counts: Ways = asked < ANYTHING
        out[:] = 0
        for table, bits, count in zip(self.outputs[place], asked, list(counts), strict=True):
            if count.any():
                np.add(out, np.take(table, bits, 0, out=spare, mode="clip"), out=out)
        return counts.sum(0, dtype=np.uint8)[:, None]

    def _back(self, ways: list[Ways], state: Numbers) -> Octets:
        """Follow ways back from states, one by lane, and return the bits that were taken."""
        lanes, taken = np.arange(len(state)), np.zeros((len(ways), len(state)), np.uint8)
        for turn in reversed(range(len(ways))):
            newest, between = state & 1, state >> 1
            taken[turn] = newest
            oldest = ways[turn][newest, lanes, between].astype(np.intp)
            state = oldest << (self.memory - 1) | between
        return taken


def _beside(wanted: Octets, starts: Numbers, steps: int) -> Numbers:
    """Return so many steps from each start on, (steps, num_outputs, starts)."""
    return wanted[starts + np.arange(steps)[:, None]].transpose(0, 2, 1).astype(np.intp)
