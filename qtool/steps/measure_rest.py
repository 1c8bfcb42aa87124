"""What a run takes beside its blocks, measured on a part: tables, copying, end-to-end tuning."""

from dataclasses import replace
from math import prod

from qtool.checkpoint.writer import CheckpointWriter
from qtool.formats._dtypes import item_bytes
from qtool.scheme import Shape2D
from qtool.steps.measure_blocks import kind_of
from qtool.steps.plan import LayerPlan, original_bytes
from qtool.steps.run import Run
from qtool.steps.solve import copied
from qtool.steps.solve_table import solve_alone
from qtool.steps.usage import Meter

COPY = "copy"
MOST_WEIGHTS = 2**24
"""Of a table are solved; the others take as long."""


def measure_tables(run: Run, meter: Meter) -> dict[str, float]:
    """Solve the first rows of embedding and head, without data.

    Returns:
        Of each table, by `kind_of`, how many times that is the whole.
    """
    times = {}
    for layer in run.plan.layers:
        if layer.role == "block":
            continue
        rows = _rows(layer)
        kind = kind_of(run.source, layer)
        times[kind] = layer.shape.out_features / rows
        part = replace(layer, shape=Shape2D(rows, layer.shape.in_features), row_bits=b"")
        if layer.scheme.rows:
            part = part.uniform(layer.scheme.num_bits)
        with meter.measuring(kind):
            weight = run.source.read_weight(layer.name)[:rows].to(run.env.device)
            solve_alone(part, weight, run.env)
    return times


def _rows(layer: LayerPlan) -> int:
    """Return how many rows are solved: whole groups, if these lie along them."""
    whole = layer.scheme.group_dim == "out_features"
    few = max(1, MOST_WEIGHTS // layer.shape.in_features)
    return layer.shape.out_features if whole else min(layer.shape.out_features, few)


def measure_copying(run: Run, writer: CheckpointWriter, meter: Meter) -> int:
    """Copy the largest tensor that stays as it is; return its bytes, 0 if there is none."""
    sizes = {name: original_bytes(run.source, name) for name in run.plan.kept}
    if not sizes:
        return 0
    name = max(sizes, key=sizes.__getitem__)
    with meter.measuring(COPY):
        writer.once(name, lambda: copied(run, name))
    return sizes[name]


def table_bytes(run: Run) -> int:
    """Return what the largest table takes in float32, and as it is stored."""
    sizes = [
        prod(layer.shape) * (4 + item_bytes(run.source.spec(f"{layer.name}.weight").dtype))
        for layer in run.plan.layers
        if layer.role != "block"
    ]
    return max(sizes, default=0)
