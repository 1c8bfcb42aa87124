"""The step that says how many bits each row of the embedding and of the head gets."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from qtool.base import Progress
from qtool.checkpoint.manifest import codec, num_bytes
from qtool.checkpoint.spool import Made
from qtool.checkpoint.writer import CheckpointWriter
from qtool.choosing.rows import cluster_widths, share_bits
from qtool.data.special_tokens import protected_tokens
from qtool.modeling.load import load_tokenizer
from qtool.recipe.rows import RowsSection
from qtool.steps.plan import LayerPlan, load_method
from qtool.steps.run import Run
from qtool.steps.solve_table import solve_alone
from qtool.steps.table_rows import parts_of
from qtool.steps.table_statistics import TableStatistics, measure_tables, table_hessian

OF_ROWS = "bits"
"""Draft: the bits of all rows, under the name of the table."""
SAMPLED_ROWS, SAMPLED_BITS = 256, 4
"""Evenly spaced by frequency; on these is measured what each width costs, up to so many bits: from
there on each bit quarters the error, and solving takes long."""


def choose_rows(run: Run, writer: CheckpointWriter | None = None) -> Run:
    """Return the run with a plan that says the bits of each row, where the recipe asks for that.

    Args:
        run: Its plan has what the recipe says.
        writer: Keeps what is chosen for a run that goes on; None: this is no such run.

    Raises:
        MethodError: as `measure_tables`.
    """
    statistics = cache(partial(measure_tables, run, writer))
    layers = tuple(_chosen(run, layer, writer, statistics) for layer in run.plan.layers)
    return replace(run, plan=replace(run.plan, layers=layers))


def _chosen(
    run: Run,
    layer: LayerPlan,
    writer: CheckpointWriter | None,
    statistics: Callable[[], TableStatistics],
) -> LayerPlan:
    tables = {"embedding": run.recipe.embedding, "head": run.recipe.head}
    section = tables.get(layer.role)
    if section is None or section.rows is None:
        return layer
    make = partial(_made, run, layer, section.rows, statistics)
    if writer is None:
        return with_row_bits(layer, make().tensors(layer.name)[layer.name])
    writer.once(layer.name, make, draft=OF_ROWS)
    return with_row_bits(layer, writer.tensors(layer.name, draft=OF_ROWS)[layer.name])


def with_row_bits(layer: LayerPlan, row_bits: Tensor) -> LayerPlan:
    """Return the plan of a table with the bits of its rows, (out_features,) uint8."""
    counts = row_bits.bincount().tolist()
    rows = tuple((bits, count) for bits, count in reversed([*enumerate(counts)]) if count)
    scheme = replace(layer.scheme, num_bits=rows[0][0], rows=rows)
    parts = parts_of(load_method(layer.method), scheme, layer.shape, layer.options)
    return replace(
        layer,
        scheme=scheme,
        num_bytes=sum(map(num_bytes, parts.values())),
        row_bits=bytes(row_bits.tolist()),
    )


def _made(
    run: Run, layer: LayerPlan, rows: RowsSection, statistics: Callable[[], TableStatistics]
) -> Made:
    found = statistics()
    protected = torch.zeros(layer.shape.out_features, dtype=torch.bool)
    tokens = sorted(protected_tokens(load_tokenizer(run.source.directory)))
    protected[[token for token in tokens if token < len(protected)]] = True
    if rows.average_bits is None:
        return Made(
            cluster_widths(
                found.frequency,
                protected,
                clusters=rows.clusters,
                ratio=rows.ratio,
                min_bits=rows.min_bits,
            )
        )
    run.env.emit(Progress(f"choosing bits of the rows of {layer.name}"))
    widths = range(rows.min_bits, rows.max_bits + 1)
    losses = expected_losses(run, layer, found, widths)
    lowest = protected.long() * (int(rows.average_bits) - rows.min_bits)
    budget = rows.average_bits * len(losses)
    return Made((share_bits(losses, widths, budget, lowest) + rows.min_bits).to(torch.uint8))


def expected_losses(
    run: Run, layer: LayerPlan, statistics: TableStatistics, widths: range
) -> Tensor:
    """Return what each row adds to the divergence at each width, (rows, widths) float64.

    The squared error of a row goes with the square of its norm, times a number for each width:
    that is measured on some rows, solved as all will be.
    """
    weight = run.source.read_weight(layer.name)
    norms = torch.linalg.vector_norm(weight, dim=1).double().square()
    importance = {"embedding": statistics.importance, "head": statistics.uncertainty * norms}
    units = {"embedding": statistics.of_embedding, "head": statistics.of_head}
    if run.plan.tied_head is None:
        units = {layer.role: 1.0}
    by_frequency = statistics.frequency.argsort(descending=True, stable=True)
    places = torch.linspace(0, len(weight) - 1, min(SAMPLED_ROWS, len(weight))).long()
    sample = weight[by_frequency[places]].to(run.env.device)
    hessian = table_hessian(run, layer, statistics)
    errors: list[Mapping[str, float]] = []
    for bits in widths:
        if bits <= SAMPLED_BITS or not errors:
            errors.append(_errors(run, layer, sample, hessian, statistics, bits))
        else:
            errors.append({use: error / 4 for use, error in errors[-1].items()})
    losses = torch.zeros(len(weight), len(widths), dtype=torch.float64)
    for use, unit in units.items():
        per_row = unit * importance[use].double()
        losses += per_row.unsqueeze(1) * torch.tensor([each[use] for each in errors])
    return losses


def _errors(
    run: Run,
    layer: LayerPlan,
    sample: Tensor,
    hessian: Tensor | None,
    statistics: TableStatistics,
    bits: int,
) -> Mapping[str, float]:
    """Return the squared error of a width by use, relative to the square of the weights."""
    tensor = solve_alone(layer.uniform(bits), sample, run.env, hessian).tensor
    error = (codec(tensor.format).dequantize(tensor, torch.float32) - sample).double()
    power = sample.double().square().sum()
    under = (error @ statistics.hessian.to(error)) * error
    return {
        "embedding": float(error.square().sum() / power),
        "head": float(under.sum() / power),
    }
