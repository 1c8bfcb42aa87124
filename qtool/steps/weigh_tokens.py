"""Weigh tokens for each row group of the linears, by the gradients of the original's loss."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from qtool.base import Progress
from qtool.checkpoint.spool import Made
from qtool.checkpoint.writer import CheckpointWriter
from qtool.core.experts import expert_name
from qtool.data.calibration import batches
from qtool.modeling.load import load_source
from qtool.steps.row_edges import row_edges
from qtool.steps.run import Run
from qtool.training.output_gradients import squared_gradients
from qtool.walk.statistics import RowGroups

TOKENS_AT_ONCE = 4096
"""What the logits of a batch, and their gradients, take grows with it."""
OF_TOKENS = "weights"
"""Draft: the weights of all tokens, under the name of the list of blocks."""


def weigh_tokens_once(run: Run, writer: CheckpointWriter, groups: int) -> dict[str, RowGroups]:
    """Return what each token counts for the row groups of each linear, kept from an earlier run.

    Args:
        run: Which model and samples, and where it is computed.
        writer: Keeps the weights.
        groups: Row groups per linear, at most.

    Raises:
        MethodError: a linear doesn't see every token once, or a gradient isn't finite.
    """
    name = run.source.adapter.blocks
    edges = {
        layer.name: row_edges(layer, groups)
        for layer in run.plan.in_blocks
        if expert_name(layer.name) is None  # those see tokens of their own
    }
    writer.once(name, partial(_weighed, run, edges), draft=OF_TOKENS)
    weights = writer.tensors(name, draft=OF_TOKENS)
    return {layer: RowGroups(ends, weights[layer]) for layer, ends in edges.items()}


def _weighed(run: Run, edges: Mapping[str, tuple[int, ...]]) -> Made:
    calibration, section, env = run.calibration, run.recipe.calibration, run.env
    assert calibration is not None and section is not None
    env.emit(Progress("loading the original"))
    model = load_source(run.source, env.device)
    train, held_out = calibration.split(section.holdout)
    parts = [*batches(train.samples, TOKENS_AT_ONCE), *batches(held_out.samples, TOKENS_AT_ONCE)]

    def report(done: int) -> None:
        env.emit(Progress("weighing tokens by gradients", done, len(parts)))

    squared = squared_gradients(model, run.source.adapter.blocks, edges, parts, report)
    return Made({name: scaled(values, train.num_tokens) for name, values in squared.items()})


def scaled(squared: Tensor, num_train: int) -> Tensor:
    """Return weights whose mean over the first tokens is one, (tokens, groups) float16.

    A group whose outputs don't matter to the loss, as far as gradients say, has all ones.
    """
    mean = squared[:num_train].double().mean(0)
    weights = torch.where(mean > 0, squared / mean, 1.0)
    return weights.clamp(max=torch.finfo(torch.float16).max).to(torch.float16)
