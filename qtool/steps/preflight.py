"""What a run will take, phase by phase, from what parts of it took: no measuring here."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qtool.steps.usage import NO_USE, MachineRoom, Usage
from qtool.wording import gigabytes

ROOMS = {
    "memory": "memory of this machine",
    "card": "memory of the card",
    "disk": "free disk",
    "node": "memory of a node",
    "worker's card": "memory of its card",
}
FEWER_SAMPLES = "use fewer samples (calibration.num_samples) or shorter ones (sequence_length)"
ADVICE = {
    ("capture", "memory"): f"{FEWER_SAMPLES}, or calibration.cache=disk",
    ("solve blocks", "memory"): f"{FEWER_SAMPLES}, or calibration.cache=disk",
    ("tune blocks", "memory"): f"{FEWER_SAMPLES}, or calibration.cache=disk",
    ("capture", "card"): "use shorter samples (calibration.sequence_length)",
    ("solve blocks", "card"): "use shorter samples (calibration.sequence_length)",
    ("tune blocks", "card"): "use shorter samples, or leave out tuning.blocks",
    ("tune end to end", "memory"): "lower tuning.end_to_end.batch_size or sequence_length",
    ("tune end to end", "card"): "lower tuning.end_to_end.batch_size, or set recompute to true",
    ("check", "memory"): "use --no-check",
    ("check", "card"): "use --no-check",
}
"""What to change, by phase and by what there is too little of."""
ANY = {
    "memory": "end other programs, or choose a larger machine",
    "card": "end other programs that use the card, or choose a larger one",
    "disk": "free some space, or choose another disk for OUT_DIR",
    "node": "use fewer workers on a node, or nodes with more memory",
    "worker's card": "use larger cards",
}


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a run, and what it will take."""

    name: str
    usage: Usage | None
    """None: nobody knows."""
    disk_bytes: int = 0
    """On the disk of OUT_DIR while it lasts."""
    how: str = ""
    """How that is known."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """A phase that won't fit."""

    phase: str
    what: str
    """A key of `ROOMS`."""
    needed: int
    there: int

    def sentence(self) -> str:
        """Return what is short, and what to change."""
        advice = ADVICE.get((self.phase, self.what), ANY[self.what])
        return (
            f"'{self.phase}' needs {gigabytes(self.needed)} of {ROOMS[self.what]}, and there are "
            f"{gigabytes(self.there)}: {advice}."
        )


@dataclass(frozen=True, slots=True)
class Preflight:
    """What a run will take, in its phases' order, and what there is."""

    phases: tuple[Phase, ...]
    room: MachineRoom

    @property
    def total(self) -> Usage:
        """All phases that are known, one after the other."""
        return sum((phase.usage or NO_USE for phase in self.phases), NO_USE)

    @property
    def disk_bytes(self) -> int:
        """What the run takes of the disk at most."""
        return max((phase.disk_bytes for phase in self.phases), default=0)

    @property
    def is_whole(self) -> bool:
        """Whether it is known of every phase how long it takes."""
        return all(phase.usage is not None for phase in self.phases)

    def needs(self, phase: Phase) -> dict[str, int]:
        """Return what a phase needs of each kind of room, in bytes."""
        usage = phase.usage or NO_USE
        return {
            "memory": usage.memory_bytes,
            "card": usage.card_bytes,
            "disk": phase.disk_bytes,
        }

    def there(self) -> dict[str, int]:
        """Return what there is of each, in bytes."""
        return {
            "memory": self.room.memory_bytes,
            "card": self.room.card_bytes,
            "disk": self.room.disk_bytes,
        }

    def shortages(self) -> Iterator[Shortage]:
        """Yield what won't fit."""
        there = self.there()
        for phase in self.phases:
            for what, needed in self.needs(phase).items():
                if needed > there[what]:
                    yield Shortage(phase.name, what, needed, there[what])

    def to_json(self) -> dict[str, Any]:
        """Return it for machines: seconds and bytes; margins are what would be left."""
        total, there = self.total, self.there()
        return {
            "phases": [
                {
                    "name": phase.name,
                    "how": phase.how,
                    **(asdict(phase.usage) if phase.usage is not None else {}),
                    "disk_bytes": phase.disk_bytes,
                    "margins": {
                        what: there[what] - needed
                        for what, needed in self.needs(phase).items()
                        if needed
                    },
                }
                for phase in self.phases
            ],
            "total": {**asdict(total), "disk_bytes": self.disk_bytes},
            "is_whole": self.is_whole,
            "room": asdict(self.room),
            "shortages": [shortage.sentence() for shortage in self.shortages()],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCosts:
    """What blocks take, measured on some of them."""

    layers: Mapping[str, Usage]
    """By `measure_blocks.kind_of`, with the statistics that the first of a group waits for."""
    weights: Mapping[str, int]
    """How many each of these kinds has, and those that weren't measured."""
    advance: Usage = NO_USE
    """Running a block, original and quantized, over all samples; loading the next."""
    after: Usage = NO_USE
    """What comes once a block is solved, beside tuning."""


def solving(
    costs: BlockCosts, blocks: Sequence[Sequence[str]], *, passed: int, tuned: Usage = NO_USE
) -> tuple[Usage, Usage]:
    """Return what solving and tuning all blocks takes.

    Args:
        costs: What was measured.
        blocks: The kinds of the layers of each block that has some.
        passed: How many blocks the walk leaves behind.
        tuned: What tuning one block takes.
    """
    found = costs.advance * passed + costs.after * len(blocks)
    for block in blocks:
        for kind in block:
            found = found + _priced(costs, kind)
    return found, tuned * len(blocks)


def _priced(costs: BlockCosts, kind: str) -> Usage:
    """Return what a layer takes; one that wasn't measured as long as others per weight."""
    if kind in costs.layers:
        return costs.layers[kind]
    measured = sum(costs.layers.values(), NO_USE)
    weights = sum(costs.weights[each] for each in costs.layers)
    return measured * (costs.weights[kind] / max(weights, 1))


def stretched(few: Usage, more: Usage, *, steps: tuple[int, int], wanted: int) -> Usage:
    """Return what some steps take, from what a few and a few more took: looks are the same."""
    each = (more - few) * (1 / (steps[1] - steps[0]))
    return few + each * (wanted - steps[0]) if wanted > steps[0] else few
