"""The tables of `quantize --dry-run`: what would happen to each layer, and why."""

from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from qtool.cli import console
from qtool.cli.tables.alike import alike
from qtool.wording import gigabytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from qtool.choosing.choose import Allocation, ChosenLayer
    from qtool.steps.plan import LayerPlan, Plan


def print_plan(plan: "Plan", allocation: "Allocation | None", json_file: Path | None) -> None:
    """Print what a run would do to each layer, and why."""
    rows = [
        {
            "name": layer.name,
            "method": layer.method,
            **layer.scheme.to_json(),
            "shape": list(layer.shape),
            "average_bits": layer.average_bits,
            "bytes": layer.num_bytes,
        }
        for layer in plan.layers
    ]
    total = {
        "average_bits": plan.average_bits,
        "quantized_bytes": plan.total_bytes - plan.kept_bytes,
        "kept_bytes": plan.kept_bytes,
        "total_bytes": plan.total_bytes,
        "source_bytes": plan.source_bytes,
    }
    reasons = {} if allocation is None else {"choosing": allocation.summary()}
    if not console.write_json({"layers": rows, **total, **reasons}, json_file):
        return
    columns = ("layer", ">count", ">shape", "method", ">bits", ">group", ">average bits", ">size")
    console.print_table("Plan (nothing was written)", columns, _rows(plan.layers))
    console.out.print(
        f"{len(plan.layers)} layers at {plan.average_bits:.3f} bits: "
        f"{gigabytes(plan.total_bytes - plan.kept_bytes)}, "
        f"{gigabytes(plan.kept_bytes)} kept as they are; "
        f"{gigabytes(plan.total_bytes)} in all, "
        f"{plan.total_bytes / plan.source_bytes:.0%} of the original."
    )
    if allocation is not None:
        _print_reasons(allocation)


def _rows(layers: "Iterable[LayerPlan]") -> "Iterator[tuple[str, ...]]":
    """Yield the cells of each kind of layers that are alike."""
    for name, same in alike(layers, attrgetter("name"), _cells):
        total = gigabytes(sum(layer.num_bytes for layer in same))
        yield (name, str(len(same)), *_cells(same[0]), total)


def _cells(layer: "LayerPlan") -> tuple[str, ...]:
    scheme = layer.scheme
    along = " (out)" if scheme.group_dim == "out_features" else ""
    return (
        "x".join(map(str, layer.shape)),
        " or ".join(name for name, _ in layer.methods),
        f"{scheme.rows[-1][0]}-{scheme.num_bits}" if scheme.rows else str(scheme.num_bits),
        f"{scheme.group_size or 'row'}{along}",
        f"{layer.average_bits:.2f}",
    )


def _print_reasons(allocation: "Allocation") -> None:
    """Print what each choice costs, and what one more or one less would be worth."""
    kinds = alike(allocation.layers, attrgetter("name"), _choice)
    columns = (
        "layer",
        ">count",
        ">bits",
        ">group",
        ">bytes",
        ">KL",
        ">gain per MiB",
        ">loss per MiB",
    )
    console.print_table("Chosen", columns, (_chosen(*each) for each in kinds))
    console.print_lines(
        [
            f"{allocation.average_bits:.3f} bits on average, of the "
            f"{allocation.budget.average_bits:g} that may be. KL: nats per token that the choice "
            f"costs, as gradients foretell; {allocation.divergence:.3g} in all.",
            "Gain and loss: what a layer, with those that share its choice, would win by its "
            "best wider choice, and lose by its best narrower one; of several the largest gain and "
            "the smallest loss. --json has each layer.",
            f"The prices took {allocation.seconds:.0f} s, and are kept for the run itself.",
        ]
    )


def _choice(row: "ChosenLayer") -> tuple[str, str]:
    """Return the bits and the group of a layer."""
    scheme = None if row.plan is None else row.plan.scheme
    return ("16", "") if scheme is None else (str(scheme.num_bits), str(scheme.group_size or "row"))


def _chosen(name: str, same: "Sequence[ChosenLayer]") -> tuple[str, ...]:
    gains = [row.margin.gain for row in same if row.margin.gain is not None]
    losses = [row.margin.loss for row in same if row.margin.loss is not None]
    return (
        name,
        str(len(same)),
        *_choice(same[0]),
        f"{sum(row.num_bytes for row in same):,}",
        f"{sum(row.price for row in same):.2e}",
        f"{max(gains):.2e}" if gains else "",
        f"{min(losses):.2e}" if losses else "",
    )
