"""Options of commands whose work can be shared among workers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from qtool.cli.options import in_panel
from qtool.errors import RecipeError

if TYPE_CHECKING:
    from qtool.engines import EngineOptions
    from qtool.steps.cluster import Cluster

MOST_WORKERS = 4096
TEN_GIGABIT = 1.25
"""GB/s."""
_engine = in_panel("Workers")


def _known(text: str | None) -> str | None:
    """Check the name of an engine."""
    from qtool.engines import engine_names
    from qtool.plugins import check_name

    if text is not None:
        check_name(text, engine_names(), "engines")
    return text


EngineOption = Annotated[
    str | None,
    _engine(
        "--engine",
        callback=_known,
        help="Share the work among processes of this machine (local) or machines (ray).",
    ),
]
WorkersOption = Annotated[
    int | None,
    _engine(min=1, max=MOST_WORKERS, help="How many; default: one per card, or core."),
]
ThreadsOption = Annotated[
    int | None,
    _engine(min=1, max=1024, help="Of each worker on a CPU, 1 by default; decides last bits."),
]
AddressOption = Annotated[
    str | None, _engine(help="Of a cluster of Ray: auto, or host:port; default: this machine.")
]

NodesOption = Annotated[
    int | None, _engine(min=1, max=MOST_WORKERS, help="Of the cluster that --dry-run=cluster has.")
]
NodeMemoryOption = Annotated[
    float | None, _engine(min=0.001, help="GB of each of these nodes; default: as this one.")
]
NetworkOption = Annotated[
    float | None, _engine(min=0.001, help="GB/s in or out of each; default: 1.25, 10 Gbit/s.")
]


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """What --dry-run=cluster is asked for."""

    nodes: int | None
    memory: float | None
    network: float | None

    def check(self, *, is_asked: bool) -> None:
        """Refuse them without --dry-run=cluster.

        Raises:
            RecipeError: one is given.
        """
        others = {
            "--nodes": self.nodes,
            "--node-memory": self.memory,
            "--network": self.network,
        }
        given = [name for name, value in others.items() if value is not None]
        if given and not is_asked:
            raise RecipeError(f"{' and '.join(given)} need --dry-run=cluster. Add it.")

    def cluster(self, workers: int | None, threads: int) -> "Cluster":
        """Return the cluster: nodes like this machine, but for what is given."""
        from qtool import pipeline

        nodes = self.nodes or 1
        return pipeline.cluster_like_this(
            nodes,
            workers,
            threads,
            memory_bytes=None if self.memory is None else int(self.memory * 1e9),
            network=(self.network or TEN_GIGABIT) * 1e9,
        )


def engine_options(
    engine: str | None, workers: int | None, threads: int | None, address: str | None
) -> "EngineOptions | None":
    """Return what the options ask for; None: this process does the work.

    Raises:
        RecipeError: an option makes no sense without another.
    """
    from qtool.engines import EngineOptions, Workers

    others = {"--workers": workers, "--threads": threads, "--address": address}
    given = [name for name, value in others.items() if value is not None]
    if engine is None and given:
        raise RecipeError(f"{' and '.join(given)} need --engine. Add --engine local or ray.")
    if engine is None:
        return None
    return EngineOptions(engine, Workers(count=workers, threads=threads or 1, address=address))
