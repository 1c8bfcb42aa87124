"""What a run takes on machines that aren't there: its tasks, carried out on paper.

The same decisions as those of the engines: chunks of the samples go to workers in turn, sums are
added one chunk after the other, and what costs most is solved first.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qtool.steps.preflight import Shortage

SUMS_AT_ONCE = 4
"""Those of a chunk that the command holds: the total, in float64, and one as bytes and as sums."""
SENT = 2
"""Likewise of a worker: as sums, and as bytes."""
ALIVE = 9
"""Matrices as large as a Hessian while a linear is solved, its statistics among them."""
ROWS_ALIVE = 8
"""Matrices as large as the rows that are solved at once."""
FLOAT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Machines, all alike."""

    nodes: int
    workers: int
    """On all of them."""
    memory_bytes: int
    """Of each."""
    card_bytes: int = 0
    """Of each worker's card; 0: there are none."""
    network: float
    """Bytes per second in or out of one."""

    @property
    def crowd(self) -> int:
        """Workers of a node, at most."""
        return -(-self.workers // self.nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputGroup:
    """Linears of a block that share an input: measured once, solved side by side."""

    name: str
    in_features: int
    residual: int
    """Width of the residual stream that is measured with it; 0: none is."""
    measuring: float
    """Seconds, of all samples by one worker."""
    parts: tuple[tuple[int, float], ...]
    """Rows, and seconds to solve them, of each task."""

    @property
    def sums_bytes(self) -> int:
        """Those of a chunk: of the tokens to solve by, and of those held out."""
        n = self.in_features
        return FLOAT * n * (5 * n + 3 * self.residual)

    @property
    def solving_bytes(self) -> int:
        """What solving a part takes at most."""
        n, rows = self.in_features, max(rows for rows, _ in self.parts)
        return FLOAT * n * (ALIVE * n + ROWS_ALIVE * rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWork:
    """What is done for each block of a kind."""

    count: int
    stored_bytes: int
    walked_bytes: int
    """As it is run, original and quantized."""
    advance: float
    """Seconds to run both over all samples, by one worker, and to load the next."""
    groups: tuple[InputGroup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterWork:
    """All that is shared, and what isn't."""

    blocks: tuple[BlockWork, ...]
    tables: tuple[float, ...]
    """Seconds of each."""
    before: float
    """Seconds of what comes before the first block."""
    after: float
    """Seconds to copy and write, by the command alone."""
    chunks: int
    """Of the samples; 0: there are none."""
    prefix: Literal["linears", "block", "original"]
    streams_bytes: int
    """Inputs of the blocks, of all samples."""
    base_bytes: int
    """Of a process that has done nothing yet."""
    copying: float
    """Bytes per second from one process to another of the same machine."""
    adding: float
    """Bytes per second of float32 that are added up."""


@dataclass(frozen=True, slots=True)
class ClusterPhase:
    """A kind of work, of the whole run."""

    name: str
    seconds: float = 0.0
    network_bytes: int = 0

    def more(self, seconds: float, network_bytes: float = 0) -> "ClusterPhase":
        """Return it with more of the same."""
        total = self.network_bytes + int(network_bytes)
        return ClusterPhase(self.name, self.seconds + seconds, total)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run would take."""

    cluster: Cluster
    phases: tuple[ClusterPhase, ...]
    one_worker: float
    """Seconds that it would take one worker."""
    worker_bytes: int
    """Memory of a worker's process."""
    worker_card_bytes: int
    driver_bytes: int
    """Memory of the command, which is on one of the nodes."""

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def node_bytes(self) -> int:
        """Memory of the node that has the command."""
        return self.cluster.crowd * self.worker_bytes + self.driver_bytes

    def to_json(self) -> dict[str, Any]:
        """Return it for machines: seconds and bytes."""
        return {
            **asdict(self),
            "seconds": self.seconds,
            "node_bytes": self.node_bytes,
            "shortages": [shortage.sentence() for shortage in self.shortages()],
        }

    def shortages(self) -> Iterator[Shortage]:
        """Yield what the nodes have too little of."""
        there = self.cluster
        if self.node_bytes > there.memory_bytes:
            yield Shortage("command and workers", "node", self.node_bytes, there.memory_bytes)
        if there.card_bytes and self.worker_card_bytes > there.card_bytes:
            yield Shortage("worker", "worker's card", self.worker_card_bytes, there.card_bytes)


def forecast(work: ClusterWork, cluster: Cluster) -> Forecast:
    """Carry out a run's tasks on paper."""
    one = Cluster(nodes=1, workers=1, memory_bytes=0, network=cluster.network)
    phases = _Paper(work, cluster).phases()
    alone = sum(phase.seconds for phase in _Paper(work, one).phases())
    groups = [group for block in work.blocks for group in block.groups]
    sums = max((group.sums_bytes for group in groups), default=0) if work.chunks else 0
    solving = max((group.solving_bytes for group in groups), default=0)
    walked = max((block.walked_bytes for block in work.blocks), default=0) if work.chunks else 0
    streams = work.streams_bytes * _part(work.chunks, cluster.workers)
    own, card = work.base_bytes + int(streams), 0
    if cluster.card_bytes:
        card, own = walked + max(sums, solving), own + SENT * sums
    else:
        own += walked + max(SENT * sums, solving)
    driver = work.base_bytes + (SUMS_AT_ONCE if work.chunks > 1 else SENT) * sums
    return Forecast(cluster, phases, alone, own, card, driver)


def _part(chunks: int, workers: int) -> float:
    """Return the part of the samples that the busiest worker has."""
    return -(-chunks // min(workers, chunks)) / chunks if chunks else 0.0


@dataclass(frozen=True, slots=True)
class _Paper:
    work: ClusterWork
    cluster: Cluster

    def phases(self) -> tuple[ClusterPhase, ...]:
        """Return what all phases take, in their order."""
        names = ("before", "pass blocks", "measure", "solve", "solve tables", "write")
        found = {name: ClusterPhase(name) for name in names}
        found["before"] = found["before"].more(self.work.before)
        for block in self.work.blocks:
            for name, seconds, network in self._block(block):
                found[name] = found[name].more(block.count * seconds, block.count * network)
        tables = self._solved(self.work.tables)
        found["solve tables"] = found["solve tables"].more(tables)
        found["write"] = found["write"].more(self.work.after)
        return tuple(found.values())

    def _block(self, block: BlockWork) -> Iterator[tuple[str, float, float]]:
        """Yield (phase, seconds, bytes over the network) of one block."""
        cluster, work = self.cluster, self.work
        away = cluster.nodes > 1
        if work.chunks:
            read = cluster.crowd * block.stored_bytes / cluster.network if away else 0.0
            seconds = block.advance * _part(work.chunks, cluster.workers) + read
            yield "pass blocks", seconds, cluster.workers * block.stored_bytes if away else 0
        side_by_side: list[Sequence[InputGroup]] = [[group] for group in block.groups]
        if work.prefix != "linears" or not work.chunks:
            side_by_side = [block.groups]
        for groups in side_by_side:
            if work.chunks:
                for group in groups:
                    network = work.chunks * group.sums_bytes * (cluster.nodes - 1) / cluster.nodes
                    yield "measure", self._measured(group), network
            sums = sum(group.sums_bytes for group in groups) if work.chunks else 0
            tasks = [seconds for group in groups for _, seconds in group.parts]
            sent = self._sent(sums) * cluster.nodes if cluster.workers > 1 else 0.0
            yield "solve", sent + self._solved(tasks), sums * (cluster.nodes - 1)

    def _sent(self, size: int) -> float:
        """Return the seconds that bytes take from one process to another."""
        across = size / self.cluster.network if self.cluster.nodes > 1 else 0.0
        return size / self.work.copying + across

    def _measured(self, group: InputGroup) -> float:
        """Return when the sums of all chunks are added up."""
        chunks, workers = self.work.chunks, self.cluster.workers
        free, added = defaultdict[int, float](float), 0.0
        sent = self._sent(group.sums_bytes) if workers > 1 else 0.0
        adding = group.sums_bytes / self.work.adding if chunks > 1 else 0.0
        for chunk in range(chunks):
            seat = chunk % workers
            added = max(added, free[seat] + group.measuring / chunks) + sent
            free[seat] = added  # when its sums are taken it is given the next
            added += adding
        return added

    def _solved(self, tasks: Sequence[float]) -> float:
        """Return when tasks of so many seconds are done, the longest begun first."""
        free = [0.0] * self.cluster.workers
        for seconds in sorted(tasks, reverse=True):
            heapq.heappush(free, heapq.heappop(free) + seconds)
        return max(free)
