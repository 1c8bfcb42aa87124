"""Which rows and columns of a stored layer one rank of vLLM holds. Needs no vLLM.

vLLM spreads linears over ranks by rows (column-parallel, in its words) or by columns
(row-parallel), and makes one of queries, keys and values, and of gate and up, which a checkpoint
holds apart or, as in Phi-3, together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from qtool.checkpoint.manifest import LayerEntry
from qtool.errors import BackendError, SchemeError
from qtool.runtime.spread import AnyWeight, narrow_to
from qtool.wording import list_names

PLAIN_PART = "weight"
"""Name of the one tensor of a layer that isn't quantized."""


@dataclass(frozen=True, slots=True)
class Rank:
    """One of the ranks that share each layer (tensor parallelism)."""

    number: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A layer of the checkpoint."""

    name: str
    entry: LayerEntry | None
    """None: it isn't quantized."""

    def part_names(self) -> tuple[str, ...]:
        """Return the names of its tensors, without the layer's."""
        return (PLAIN_PART,) if self.entry is None else tuple(self.entry.layout())


def sources_of(
    name: str, packed: Mapping[str, Sequence[str]], layers: Mapping[str, LayerEntry]
) -> tuple[StoredLayer, ...]:
    """Return the stored layers of which vLLM makes one.

    Args:
        name: Dotted name in vLLM, such as `model.layers.0.self_attn.qkv_proj`.
        packed: Last part of such a name -> those of the layers in the checkpoint, in their order.
        layers: The manifest's.
    """
    parent, dot, own = name.rpartition(".")
    names = [f"{parent}{dot}{each}" for each in packed.get(own, (own,))]
    return tuple(StoredLayer(each, layers.get(each)) for each in names)


def embedding_name(layers: Mapping[str, LayerEntry], shape: tuple[int, int]) -> str | None:
    """Return the name of the embedding of a model; None: it isn't quantized.

    It has a row for each word and lies within the model, though in no block; a head lies beside it.

    Args:
        layers: The manifest's.
        shape: Words, and what each takes.
    """
    for name, entry in layers.items():
        parts = name.split(".")
        outside = len(parts) > 1 and not any(part.isdigit() for part in parts)
        if outside and tuple(entry.shape) == shape and entry.shared_with is None:
            return name
    return None


def source_number(shard_id: object, count: int) -> int:
    """Return which of the stored layers of one of vLLM's a tensor belongs to.

    Args:
        shard_id: vLLM's: q, k, v or a number; None: there is but one.
        count: Of stored layers.

    Raises:
        BackendError: it is none of these.
    """
    if shard_id is None and count == 1:
        return 0
    number = "qkv".find(shard_id) if isinstance(shard_id, str) and shard_id else shard_id
    if isinstance(number, int) and 0 <= number < count:
        return number
    raise BackendError(f"vLLM loads part {shard_id!r} of {count}: which one isn't known.")


def start_of(total: int, size: int, rank: Rank) -> int:
    """Return where the part of a rank begins, in one dimension of a logical weight.

    Heads of keys and values that are fewer than ranks lie on several: these begin alike.

    Raises:
        BackendError: parts of this size don't make the weight, or not so many ranks.
    """
    pieces, rest = divmod(total, size)
    if rest or pieces < 1 or rank.count % pieces:
        raise BackendError(f"{rank.count} ranks can't hold {size} of {total} each.")
    return rank.number * pieces // rank.count * size


def linear_rows(
    stored: int, sizes: Sequence[int], totals: Sequence[int], rank: Rank
) -> tuple[range, ...]:
    """Return which rows of a stored layer a rank holds, per logical weight in it.

    Args:
        stored: Rows of the layer in the checkpoint.
        sizes: Rows that a rank holds of each logical weight in it: one, unless the checkpoint holds
            them together.
        totals: Rows of each in the checkpoint; of one, `stored`.
        rank: Which rank.

    Raises:
        BackendError: the weights have other sizes.
    """
    if sum(totals) != stored:
        raise BackendError(f"It has {stored} rows; the model has {sum(totals)}.")
    begins = accumulate(totals[:-1], initial=0)
    parts = zip(begins, totals, sizes, strict=True)
    starts = [(begin + start_of(total, size, rank), size) for begin, total, size in parts]
    return tuple(range(start, start + size) for start, size in starts)


def cut_for(source: StoredLayer, weight: AnyWeight, wanted: "Wanted") -> list[AnyWeight]:
    """Return what a rank holds of a stored layer.

    Raises:
        BackendError: the layer doesn't have the sizes of the model, or can't be spread like this.
    """
    stored_rows, stored_columns = weight.shape
    rank = wanted.rank
    try:
        rows = wanted.rows_of(stored_rows)
        start = start_of(stored_columns, wanted.columns, rank)
        columns = range(start, start + wanted.columns)
        return [narrow_to(narrow_to(weight, 0, part), 1, columns) for part in rows]
    except (BackendError, SchemeError) as error:
        raise BackendError(
            f"{source.name}, {stored_rows} x {stored_columns}, can't be spread over {rank.count} "
            f"ranks: {error} Lower tensor_parallel_size (pipeline_parallel_size spreads layers as "
            "they are), or quantize with a group_size that divides what a rank holds."
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What vLLM wants of each stored layer of one of its own, on this rank."""

    columns: int
    rank: Rank
    sizes: tuple[int, ...] = ()
    """Rows on this rank of the logical weights in one stored layer."""
    totals: tuple[int, ...] | None = None
    """Rows of these in the checkpoint; None: there is one, whose rows are the layer's."""
    table: range | None = None
    """Of an embedding or a head: its rows on this rank."""

    def rows_of(self, stored: int) -> tuple[range, ...]:
        """Return the rows that this rank holds of a layer with so many."""
        if self.table is not None:
            return (self.table,)
        return linear_rows(stored, self.sizes, self.totals or (stored,), self.rank)


def wanted_of(
    sources: Sequence[StoredLayer],
    sizes: Sequence[int],
    totals: Sequence[int],
    columns: int,
    rank: Rank,
) -> tuple[Wanted, ...]:
    """Return what is wanted of each stored layer of a linear.

    Args:
        sources: The stored layers: one for each logical weight, or one for all.
        sizes: Rows on this rank of each logical weight.
        totals: Rows of each in the checkpoint; only looked at if one layer has them all.
        columns: On this rank.
        rank: This one.

    Raises:
        BackendError: the checkpoint puts them together in another way.
    """
    if len(sources) == len(sizes):
        return tuple(Wanted(columns=columns, rank=rank, sizes=(size,)) for size in sizes)
    if len(sources) == 1:
        known = tuple(totals)
        return (Wanted(columns=columns, rank=rank, sizes=tuple(sizes), totals=known),)
    names = list_names([source.name for source in sources])
    raise BackendError(f"vLLM makes {len(sizes)} weights of {names}: which of which isn't known.")
