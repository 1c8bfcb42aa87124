"""The tables of `quantize --dry-run`: what would happen to each layer, and why."""

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from qtool.cli import console
from qtool.wording import gigabytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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
    columns = ("layer", ">shape", "method", ">bits", ">group", ">average bits", ">size")
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
    """Yield the cells of each layer; experts that are alike, one after the other, are one row."""
    from qtool.core.experts import expert_name

    def kind(cells: tuple[str, ...]) -> tuple[str, ...]:
        expert = expert_name(cells[0])
        return (expert.fused if expert else cells[0], *cells[1:])

    for same, alike in groupby(map(_cells, layers), kind):
        first, *others = (cells[0] for cells in alike)
        if not others:
            yield (first, *same[1:])
            continue
        begin, end = (str(name).rpartition("[")[2].rstrip("]") for name in (first, others[-1]))
        yield (f"{same[0]}[{begin} to {end}]", *same[1:-1], f"{1 + len(others)} x {same[-1]}")


def _cells(layer: "LayerPlan") -> tuple[str, ...]:
    scheme = layer.scheme
    along = " (out)" if scheme.group_dim == "out_features" else ""
    return (
        layer.name,
        "x".join(map(str, layer.shape)),
        " or ".join(name for name, _ in layer.methods),
        f"{scheme.rows[-1][0]}-{scheme.num_bits}" if scheme.rows else str(scheme.num_bits),
        f"{scheme.group_size or 'row'}{along}",
        f"{layer.average_bits:.2f}",
        gigabytes(layer.num_bytes),
    )


def _print_reasons(allocation: "Allocation") -> None:
    """Print what each choice costs, and what one more or one less would be worth."""
    columns = ("layer", ">bits", ">group", ">bytes", ">KL", ">gain per MiB", ">loss per MiB")
    console.print_table("Chosen", columns, map(_chosen, allocation.layers))
    console.print_lines(
        [
            f"{allocation.average_bits:.3f} bits on average, of the "
            f"{allocation.budget.average_bits:g} that may be. KL: nats per token that the choice "
            f"costs, as gradients foretell; {allocation.divergence:.3g} in all.",
            "Gain and loss: what the layer, with those that share its choice, would win by its "
            "best wider choice, and lose by its best narrower one.",
            f"The prices took {allocation.seconds:.0f} s, and are kept for the run itself.",
        ]
    )


def _chosen(row: "ChosenLayer") -> tuple[str, ...]:
    scheme = None if row.plan is None else row.plan.scheme
    margin = row.margin
    return (
        row.name,
        "16" if scheme is None else str(scheme.num_bits),
        "" if scheme is None else str(scheme.group_size or "row"),
        str(row.num_bytes),
        f"{row.price:.2e}",
        "" if margin.gain is None else f"{margin.gain:.2e}",
        "" if margin.loss is None else f"{margin.loss:.2e}",
    )
