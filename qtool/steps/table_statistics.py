"""What the original says of its embedding and its head: one pass over calibration samples.

To second order, the divergence that a change dW of the head makes is half the variance of dW h
under the predicted probabilities p; with errors of rows that are independent and centred that is

    1/2 sum over rows v of  mean over tokens t of  p_tv (1 - p_tv) (dw_v^T h_t)^2

and p is taken apart from h: a number per row times dw_v^T H dw_v. A row of the embedding counts as
often as its token comes, times what the model makes of it each time: squared gradients per
occurrence fall with about the root of the frequency (docs/log.md), so the root of the frequency is
left. Its error counts relative to the row: a norm is what reads it. Where the two are one table,
both uses are brought to one unit, nats per token, by what is measured when a rounded table is used
in one place only.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qtool.base import CausalModel, Progress
from qtool.checkpoint.manifest import codec
from qtool.checkpoint.spool import Made
from qtool.checkpoint.writer import CheckpointWriter
from qtool.core import hessian
from qtool.core.affine import round_weight
from qtool.data.calibration import batches, some_samples
from qtool.errors import MethodError
from qtool.modeling.load import load_source
from qtool.steps.plan import LayerPlan, load_method
from qtool.steps.run import Run
from qtool.steps.solve_table import solve_alone
from qtool.training.divergence import divergence

OF_TABLES = "statistics"
"""Draft: what is measured here, under the name of the embedding."""
TOKENS_IN_BATCH = 2048
POSITIONS_AT_ONCE = 512
"""Whose probabilities are in float32 at a time."""
MOST_TOKENS_SEEN, TOKENS_PER_INPUT = 32768, 8
"""As many tokens are run, or as many per input of the head, whichever is more."""
OTHER_WORDS = 0.05
"""Share of the tokens that other texts have beyond what samples foretell; measured, docs/log.md."""
PROBED_TOKENS = 4096
FEWEST_PROBED, PROBED_BITS = 2, 4
"""Of the held-out samples, and of the rounded tables, by which the uses of a table are compared."""


@dataclass(frozen=True, slots=True)
class TableStatistics:
    """How much rows of the embedding and of the head matter."""

    frequency: Tensor
    """(vocabulary,) float32 of each token, summing to one: half what is counted in all samples,
    half what the model expects, and a little of every token, as other texts have other words."""
    uncertainty: Tensor
    """(vocabulary,) float32: mean of p (1 - p), and a little of every token."""
    hessian: Tensor
    """(in_features, in_features) float32: mean of h h^T of the head's inputs h."""
    of_embedding: float
    """Divergence, in nats per token, per importance and relative squared error of the rows of the
    embedding; 0 where the head has a table of its own."""
    of_head: float
    """The same per uncertainty and squared error under the Hessian of the rows of the head."""
    identity: float
    """How much of the identity goes with the Hessian, for the use as embedding of a tied table."""

    @property
    def importance(self) -> Tensor:
        """Of the rows of the embedding, (vocabulary,) float32."""
        return self.frequency.sqrt()


def table_hessian(run: Run, layer: LayerPlan, found: TableStatistics) -> Tensor | None:
    """Return under what the rows of a table are solved, (in_features, in_features) float32.

    In a tied table the use as embedding adds a multiple of the identity to the head's Hessian.
    None: all weights of a row count alike, because it is an embedding alone.
    """
    if layer.role == "head":
        return found.hessian.to(run.env.device)
    if run.plan.tied_head is None:
        return None
    return (found.hessian + found.identity * torch.eye(len(found.hessian))).to(run.env.device)


def hessian_of(run: Run, writer: CheckpointWriter, layer: LayerPlan) -> Tensor | None:
    """Return under what a layer beside the walk is solved; None: without data.

    Raises:
        MethodError: as `measure_tables`.
    """
    method = load_method(layer.method)
    if run.calibration is None or "hessian" not in method.needs | method.uses:
        return None
    is_head = layer.role == "head" or (layer.role == "embedding" and run.plan.tied_head)
    return table_hessian(run, layer, measure_tables(run, writer)) if is_head else None


def measure_tables(run: Run, writer: CheckpointWriter | None) -> TableStatistics:
    """Return the statistics of a model's tables.

    Args:
        run: Which model and samples, and where it is computed.
        writer: Keeps them for a run that goes on; None: this is no such run.

    Raises:
        MethodError: the head doesn't see every token once, or its inputs aren't finite.
    """
    name = run.source.adapter.embedding
    if writer is None:
        made = _measured(run)
        return _read(made.tensors(name), made.notes)
    notes = writer.once(name, partial(_measured, run), draft=OF_TABLES)
    return _read(writer.tensors(name, draft=OF_TABLES), notes)


def _read(tensors: Mapping[str, Tensor], notes: Mapping[str, float]) -> TableStatistics:
    values: dict[str, Any] = {**tensors, **notes}
    return TableStatistics(**values)


def _measured(run: Run) -> Made:
    calibration, section, env = run.calibration, run.recipe.calibration, run.env
    assert calibration is not None and section is not None
    env.emit(Progress("loading the original"))
    model = load_source(run.source, env.device).requires_grad_(requires_grad=False)
    head = model.get_output_embeddings()
    least = TOKENS_PER_INPUT * head.weight.shape[1]
    seen = batches(some_samples(calibration.samples, max(MOST_TOKENS_SEEN, least)), TOKENS_IN_BATCH)

    def report(done: int) -> None:
        env.emit(Progress("measuring embedding and head", done, len(seen)))

    vocabulary, width = head.weight.shape
    sums = _Sums(vocabulary, width, model.device)
    with _inputs_of(head) as inputs:
        for done, tokens in enumerate(seen, start=1):
            sums.add(_logits(model, tokens), inputs.pop().flatten(0, -2))
            report(done)
    tensors = sums.means(_counts(calibration.samples, vocabulary))
    notes = {"of_embedding": 0.0, "of_head": 1.0, "identity": 0.0}
    if run.plan.tied_head is not None:
        held_out = calibration.split(section.holdout)[1]
        probes = batches(some_samples(held_out.samples, PROBED_TOKENS), TOKENS_IN_BATCH)
        notes = _probed(model, _rounded(run, model), tensors, probes)
    return Made({name: values.cpu() for name, values in tensors.items()}, notes)


def _counts(samples: Sequence[Tensor], vocabulary: int) -> Tensor:
    return sum(torch.bincount(sample, minlength=vocabulary) for sample in samples)  # type: ignore[return-value]


def _with_others(shares: Tensor) -> Tensor:
    """Return shares of tokens where a few of all tokens are any."""
    return (1 - OTHER_WORDS) * shares + OTHER_WORDS / len(shares)


@contextmanager
def _inputs_of(head: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a module gets, as long as the block runs."""
    inputs: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        yield inputs
    finally:
        handle.remove()


@torch.inference_mode()
def _logits(model: CausalModel, tokens: Tensor) -> Tensor:
    """Return (tokens, vocabulary) in the model's dtype."""
    logits: Tensor = model(tokens.to(model.device), use_cache=False).logits
    return logits.flatten(0, 1)


class _Sums:
    """Sums over tokens of what the head gets and gives."""

    def __init__(self, vocabulary: int, width: int, device: torch.device) -> None:
        self._expected = torch.zeros(vocabulary, dtype=torch.float64, device=device)
        self._uncertain = torch.zeros_like(self._expected)
        self._hessian = torch.zeros(width, width, device=device)
        self._num_tokens = 0

    def add(self, logits: Tensor, inputs: Tensor) -> None:
        if len(logits) != len(inputs):
            raise MethodError(
                f"The head sees {len(inputs)} tokens where the model predicts {len(logits)}. "
                "Quantize it with a method that takes no data, such as rtn, and without rows."
            )
        hessian.accumulate(self._hessian, inputs, inputs)
        self._num_tokens += len(inputs)
        for part in logits.split(POSITIONS_AT_ONCE):
            chances = part.float().softmax(-1)
            self._expected += chances.sum(0)
            self._uncertain += (chances * (1 - chances)).sum(0)

    def means(self, counts: Tensor) -> dict[str, Tensor]:
        if not bool(torch.isfinite(self._hessian).all() & torch.isfinite(self._expected).all()):
            raise MethodError(
                "What the head gets or predicts holds NaN or infinity: the model is damaged, or "
                "leaves the range of its dtype. Quantize the table without calibration data."
            )
        expected = self._expected / self._num_tokens
        found = counts.to(expected) / counts.sum()
        return {
            "frequency": _with_others((expected + found) / 2).float(),
            "uncertainty": _with_others(self._uncertain / self._num_tokens).float(),
            "hessian": self._hessian / self._num_tokens,
        }


def _rounded(run: Run, model: CausalModel) -> dict[str, Tensor]:
    """Return by use the table with a few bits, in the dtype of the model.

    As embedding it has about the bits that the plan gives it, since the divergence rises faster
    than the error there; as head it has enough for the second order to hold.
    """
    name = run.source.adapter.embedding
    (layer,) = (layer for layer in run.plan.layers if layer.name == name)
    weight, classes = model.get_input_embeddings().weight, layer.scheme.classes(layer.shape)
    average = round(sum(bits * count for bits, count in classes) / layer.shape.out_features)
    few = layer.uniform(min(max(average, FEWEST_PROBED), PROBED_BITS))
    tensor = solve_alone(few, weight.float(), run.env).tensor
    tables = {
        "of_embedding": codec(tensor.format).dequantize(tensor, torch.float32),
        "of_head": round_weight(weight.float(), layer.scheme.uniform(PROBED_BITS)),
    }
    return {use: table.to(weight.dtype) for use, table in tables.items()}


def _probed(
    model: CausalModel,
    rounded: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    probes: Sequence[Tensor],
) -> dict[str, float]:
    """Use a rounded table in one place, then in the other; return nats per unit of loss of each."""
    weight = model.get_input_embeddings().weight.float()
    errors = {use: table.float() - weight for use, table in rounded.items()}
    importance = tensors["frequency"].sqrt()
    norms = weight.square().sum(1)
    per_row = torch.where(norms > 0, importance / norms, 0.0)  # rows of zeros are stored exactly
    squared = errors["of_embedding"].square().sum(1)
    under = ((errors["of_head"] @ tensors["hessian"]) * errors["of_head"]).sum(1)
    units = {
        "of_embedding": (model.get_input_embeddings(), per_row @ squared),
        "of_head": (model.get_output_embeddings(), tensors["uncertainty"] @ under),
    }
    totals = dict.fromkeys(units, 0.0)
    num_tokens = sum(tokens.numel() for tokens in probes)
    for tokens in probes:
        wanted = _logits(model, tokens)
        for use, (module, _) in units.items():
            logits = _with_weight(module, rounded[use], partial(_logits, model, tokens))
            totals[use] += tokens.numel() / num_tokens * float(divergence(logits, wanted))
    found = {use: totals[use] / max(float(unit), 1e-30) for use, (_, unit) in units.items()}
    # Of all rows together: what a squared error costs here, and one under the Hessian there.
    here = found["of_embedding"] * float(per_row.sum())
    there = found["of_head"] * float(tensors["uncertainty"].sum())
    return {**found, "identity": here / max(there, 1e-30)}


def _with_weight(module: nn.Module, weight: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """Return what `run` gives while one module, and none that it is tied to, has another weight."""
    own = module.weight
    module.weight = nn.Parameter(weight, requires_grad=False)
    try:
        return run()
    finally:
        module.weight = own
