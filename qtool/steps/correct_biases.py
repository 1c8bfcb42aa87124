"""Correct the biases of a block's linears, so that their outputs are right on average.

What quantization upstream and of a weight leaves of a linear's output has a mean over the tokens.
Where the linear has a bias, that takes the mean away: b + E[W x_o - Q x] in place of b, x_o and x
being what it sees in the original and in the quantized model; of linears whose outputs are added to
the residual stream, the mean error of the stream behind them. Nagel et al. 2019 (Data-Free
Quantization, arXiv 1906.04721) have the case x = x_o. That samples which the means weren't taken on
decide, by the error of the block's output, is our design.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qtool.base import Notice, Progress
from qtool.checkpoint.spool import Made
from qtool.checkpoint.writer import CheckpointWriter
from qtool.steps.run import Run
from qtool.walk.filled_block import Block
from qtool.walk.observe import observe_outputs
from qtool.walk.streams import Visit
from qtool.walk.walk import Walk

CORRECTED = "corrected"
"""Draft: of a block, the biases that took another value."""
Residual = tuple[str, str] | None
"""As `ModelSource.residual`."""


@dataclass(frozen=True, slots=True)
class Correction:
    """What became of the biases of a block."""

    biases: Mapping[str, Tensor]
    """By linear, as its name is in the block: those that took another value, (out_features,)."""
    before: float
    """Squared error of the block's output on the held-out samples, over the output's square."""
    after: float
    """The same with these biases; no more than before."""


def biased_layers(run: Run) -> dict[str, list[list[str]]]:
    """Return the linears whose biases are to be corrected, by block, grouped by shared inputs.

    Names of linears are those that they have in the block. Blocks without any are left out, and all
    are where the recipe doesn't ask for it.
    """
    section, blocks = run.recipe.calibration, run.source.adapter.blocks
    if section is None or run.calibration is None or not section.bias_correction:
        return {}
    planned, kept = {layer.name for layer in run.plan.in_blocks}, set(run.plan.kept)

    def has_bias(name: str) -> bool:
        return name in planned and f"{name}.bias" in kept

    found: dict[str, list[list[str]]] = {}
    for block in (f"{blocks}.{index}" for index in range(run.source.num_blocks)):
        groups = (
            [one for one in group if has_bias(f"{block}.{one}")]
            for group in run.source.adapter.linears
        )
        if able := [group for group in groups if group]:
            found[block] = able
    return found


def announced_biases(run: Run) -> dict[str, list[list[str]]]:
    """Return the same; warn of linears without a bias, for no checkpoint can add one."""
    found, section = biased_layers(run), run.recipe.calibration
    total = sum(1 for _ in run.plan.in_blocks)
    able = sum(len(group) for groups in found.values() for group in groups)
    if section is not None and section.bias_correction and able < total:
        run.env.emit(
            Notice(
                f"calibration.bias_correction: {total - able} of {total} linears have no bias, and "
                "a checkpoint can't add what the model's class doesn't have. "
                + ("The others are corrected." if able else "Nothing is corrected.")
            )
        )
    return found


def correct_biases_once(
    run: Run, writer: CheckpointWriter, walk: Walk, block: str, groups: Sequence[Sequence[str]]
) -> None:
    """Correct the biases of a block whose layers are all solved, unless an earlier run did.

    Args:
        run: Which model, and where it is computed.
        writer: Takes the biases.
        walk: Is told of them.
        block: Its dotted name.
        groups: Of `biased_layers`.
    """
    made = partial(_corrected, run, walk, block, groups)
    notes = writer.once(block, made, draft=CORRECTED)
    biases = writer.tensors(block, draft=CORRECTED)
    for name, bias in biases.items():
        walk.correct(name.removesuffix(".bias"), bias)
    detail = f"{block}  {len(biases)} biases  error {notes['before']:.2e} -> {notes['after']:.2e}"
    run.env.emit(Progress("correct biases", detail=detail))


def corrected_biases(run: Run, writer: CheckpointWriter) -> dict[str, Tensor]:
    """Return the biases that took another value, by full name, as the checkpoint stores them."""
    found: dict[str, Tensor] = {}
    for block in biased_layers(run):
        found |= writer.tensors(block, draft=CORRECTED)
    return found


def corrections(run: Run, writer: CheckpointWriter) -> dict[str, Mapping[str, Any]]:
    """Return what a report says of them, JSON-able: by block, see `Correction`."""
    return {block: writer.notes(block, draft=CORRECTED) for block in biased_layers(run)}


def _corrected(run: Run, walk: Walk, block: str, groups: Sequence[Sequence[str]]) -> Made:
    section, source = run.recipe.calibration, run.source
    assert section is not None
    stored = {one: source.read(f"{block}.{one}.bias") for group in groups for one in group}
    residual = source.residual if section.residual_error else None
    visit = walk.visit(int(block.rpartition(".")[2]))
    found = correct_block(visit, groups, stored, residual)
    biases = {f"{block}.{one}.bias": bias for one, bias in found.biases.items()}
    return Made(biases, {"before": found.before, "after": found.after, "biases": sorted(biases)})


def correct_block(
    visit: Visit,
    groups: Sequence[Sequence[str]],
    biases: Mapping[str, Tensor],
    residual: Residual,
) -> Correction:
    """Correct the biases of a block from some linear on, where its output's error falls by that.

    All of them, all but those of the first group, and so on are tried: one that is right on average
    may do harm as long as those behind it make up for what it was. The least error on the held-out
    samples decides; nothing changes where that of the block as it is isn't more.

    Args:
        visit: The block, all its linears solved; left as it is.
        groups: Names of linears in it that share an input, in the order of execution; each has a
            bias.
        biases: Of each of these, (out_features,) in the dtype that it is stored in.
        residual: Linears whose outputs go into the residual stream; None: no stream is looked at.
    """
    streams, block = visit.streams, visit.quantized.copy()
    names = [name for group in groups for name in group]
    first, second = (each[: streams.num_train] for each in (streams.original, streams.quantized))
    meant = mean_outputs(visit.original, names, first, residual)
    error = _BlockError(visit)
    before = after = error.of(block)
    taken: dict[str, Tensor] = {}
    for start in range(len(groups)):
        new: dict[str, Tensor] = {}
        for group in groups[start:]:
            got = mean_outputs(block, group, second, residual)
            for name in group:
                new[name] = _moved(biases[name], meant[name] - got[name])
                block.set_bias(name, new[name])
        if (found := error.of(block)) < after:
            after, taken = found, new
        for name in names:
            block.set_bias(name, biases[name])
    return Correction(taken, before, after)


class _BlockError:
    """Squared error of a block's output on the held-out samples, over the output's square."""

    def __init__(self, visit: Visit) -> None:
        """Run the original block."""
        self._streams = streams = visit.streams
        self._places = range(streams.num_train, len(streams.original))
        self._targets = [visit.original.run(streams.original[i], i) for i in self._places]
        power = sum(float(each.double().square().sum()) for each in self._targets)
        self._power = max(power, 1e-30)

    def of(self, block: Block) -> float:
        outputs = (block.run(self._streams.quantized[i], i) for i in self._places)
        pairs = zip(outputs, self._targets, strict=True)
        total = sum(float((got.double() - want.double()).square().sum()) for got, want in pairs)
        return total / self._power


def _moved(bias: Tensor, change: Tensor) -> Tensor:
    return (bias.double() + change.cpu()).to(bias.dtype)


def mean_outputs(
    block: Block, linears: Sequence[str], hidden: Sequence[Tensor], residual: Residual
) -> dict[str, Tensor]:
    """Return the means over all tokens of what linears put out, (out_features,) float64.

    Of those that add to the residual stream it is the mean of that sum.
    """
    of_attention, of_mlp = residual or (None, None)
    sums: dict[str, Tensor] = {}
    count = 0
    for batch, inputs in enumerate(hidden):
        outputs, last = observe_outputs(block, linears, inputs, batch)
        for name, output in outputs.items():
            values = last.flatten(0, -2) if name == of_mlp else output
            total = values.sum(0, dtype=torch.float64)
            if name == of_attention:
                total += inputs.flatten(0, -2).to(total.device).sum(0, dtype=torch.float64)
            sums[name] = sums[name] + total if name in sums else total
        count += inputs.shape[0] * inputs.shape[1]
    return {name: total / count for name, total in sums.items()}
