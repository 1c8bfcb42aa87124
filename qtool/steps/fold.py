"""The step that folds factors between inputs and weights into the model that is quantized.

One pass through the original, block by block: each group of linears is searched by itself, with
what it sees there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from qtool.base import Progress
from qtool.checkpoint.spool import Made
from qtool.checkpoint.writer import CheckpointWriter
from qtool.core.activations import fake_quantize
from qtool.core.affine import round_weight
from qtool.core.magnitudes import Magnitudes
from qtool.data.calibration import batches, some_samples
from qtool.errors import MethodError
from qtool.folds import FoldProblem, load_fold
from qtool.modeling.foldable import FoldGroup, fold_groups
from qtool.modeling.folded import fold_source
from qtool.modeling.source import ModelSource
from qtool.recipe.activations import ActivationsSection
from qtool.recipe.folding import FoldSection
from qtool.steps.activation_ranges import step_of
from qtool.steps.check_fold import fold_options
from qtool.steps.plan import LayerPlan
from qtool.steps.run import Run
from qtool.walk.blocks import BlockModel
from qtool.walk.observe import observe

FACTORS = "factors"
"""Draft: the factors of a block, under the name of the block."""
TOKENS_PER_RUN = 2048
RoundInputs = Callable[[Tensor, Tensor], Tensor]


def fold(run: Run, writer: CheckpointWriter | None = None) -> Run:
    """Return the run with the source that its recipe's section `fold` makes of it.

    Args:
        run: Its source is the original.
        writer: Keeps the factors of each block for a run that goes on; None: this is no such run.

    Raises:
        MethodError: inputs of a linear aren't finite.
    """
    section, source = run.recipe.fold, run.source
    if section is None:
        return run
    search = FoldSearch(run, section)
    groups: list[FoldGroup] = []
    factors: dict[str, Tensor] = {}
    for index in range(source.num_blocks):
        found = list(wanted_groups(source, section, index))
        factors |= _once(writer, f"{source.adapter.blocks}.{index}", partial(search, index, found))
        groups += found
    return replace(run, source=fold_source(source, groups, factors))


def _once(
    writer: CheckpointWriter | None, name: str, make: Callable[[], Made]
) -> Mapping[str, Tensor]:
    if writer is None:
        return make().tensors(name)
    writer.once(name, make, draft=FACTORS)
    return writer.tensors(name, draft=FACTORS)


def wanted_groups(source: ModelSource, section: FoldSection, index: int) -> Iterator[FoldGroup]:
    """Yield the groups of a block that the recipe asks for."""
    depth = source.adapter.blocks.count(".") + 2
    for group in fold_groups(source, index):
        names = {".".join(name.split(".")[depth:]) for name in group.linears}
        if not section.groups or names.intersection(section.groups):
            yield group


class FoldSearch:
    """Goes through the blocks of the original as far as factors are asked for."""

    def __init__(self, run: Run, section: FoldSection) -> None:
        self._run, self._section = run, section
        self._fold, self._options = load_fold(section.name), fold_options(section)
        self._layers = {layer.name: layer for layer in run.plan.in_blocks}
        self._route: tuple[BlockModel, list[Tensor]] | None = None
        self._index = 0

    def __call__(self, index: int, groups: Sequence[FoldGroup]) -> Made:
        """Return the factors of a block, by the first linear of each group."""
        run, source = self._run, self._run.source
        seen = self._go_to(index, [group.linears[0] for group in groups])
        factors: dict[str, Tensor] = {}
        notes: dict[str, Mapping[str, float]] = {}
        for group in groups:
            name = group.linears[0]
            layers = [self._layers[one] for one in group.linears if one in self._layers]
            if not layers:  # none will be quantized
                factors[name] = torch.ones(len(group.channel))
                continue
            problem = _problem(run, layers, group, seen.pop(name))
            solution = self._fold.search(problem, self._options)
            factors[name], notes[name] = solution.factors.cpu(), dict(solution.metrics)
        name = f"{source.adapter.blocks}.{index}"
        run.env.emit(Progress("folding", index + 1, source.num_blocks, name + _gains(notes)))
        return Made(factors, notes)

    def _go_to(self, index: int, linears: Sequence[str]) -> dict[str, "_Inputs"]:
        """Run all blocks up to one; return what its linears see."""
        model, hidden = self._route = self._route or self._begin()
        seen: dict[str, _Inputs] = {}
        total = sum(batch.shape[0] * batch.shape[1] for batch in hidden)
        kept = _evenly(total, self._section.tokens)
        while self._index <= index:
            block, start = model.load(self._index), 0
            last = self._index == index
            prefix = f"{self._run.source.adapter.blocks}.{index}."
            inner = [name.removeprefix(prefix) for name in linears] if last else []
            for batch, inputs in enumerate(hidden):
                found, output = observe(block, inner, inputs, batch)
                stop = start + inputs.shape[0] * inputs.shape[1]
                places = kept[(kept >= start) & (kept < stop)] - start
                for name, values in found.items():
                    one = seen.setdefault(prefix + name, _Inputs.none(values))
                    one.add(values, places)
                hidden[batch], start = output.cpu(), stop
            self._index += 1
        return seen

    def _begin(self) -> tuple[BlockModel, list[Tensor]]:
        run, section = self._run, self._run.recipe.calibration
        assert run.calibration is not None and section is not None
        run.env.emit(Progress("capturing the inputs of the first block"))
        model = BlockModel(run.source, run.env.device, dtype=section.dtype, parts=run.env.parts)
        train, _ = run.calibration.split(section.holdout)
        samples = some_samples(train.samples, self._section.tokens_seen)
        return model, model.capture(batches(samples, TOKENS_PER_RUN))


def _gains(notes: Mapping[str, Mapping[str, float]]) -> str:
    """Say what is left of the error of the outputs, on average over the groups of a block."""
    shares = [
        one["error"] / one["error_unfolded"] for one in notes.values() if one["error_unfolded"] > 0
    ]
    return f"  {fmean(shares):.0%} of the error is left" if shares else ""


def _evenly(total: int, wanted: int) -> Tensor:
    """Return so many places of a total, evenly spaced, the first among them."""
    return torch.linspace(0, total - 1, min(total, wanted)).round().long()


@dataclass(slots=True)
class _Inputs:
    """What linears that share their inputs see, summed up batch by batch."""

    sums: Tensor
    """Of absolute values, (in_features,) float32."""
    largest: Tensor
    num_tokens: int
    some: list[Tensor]
    """Each (tokens, in_features) float32."""

    @staticmethod
    def none(like: Tensor) -> "_Inputs":
        zeros = torch.zeros(like.shape[-1], device=like.device)
        return _Inputs(zeros, zeros.clone(), 0, [])

    def add(self, values: Tensor, places: Tensor) -> None:
        """Add (tokens, in_features); those at `places` are kept."""
        size = values.abs().float()
        self.sums += size.sum(0)
        self.largest = torch.maximum(self.largest, size.amax(0))
        self.num_tokens += len(values)
        self.some.append(values[places.to(values.device)].float())


def _problem(run: Run, layers: Sequence[LayerPlan], group: FoldGroup, seen: _Inputs) -> FoldProblem:
    if not bool(torch.isfinite(seen.sums).all()):
        raise MethodError(
            f"The inputs of {layers[0].name} hold NaN or infinity in the original: the model is "
            "damaged, or leaves the range of its dtype. Set calibration.dtype to float32.",
            layer=layers[0].name,
        )
    device = run.env.device
    return FoldProblem(
        name=layers[0].name,
        weights=tuple(run.source.read_weight(layer.name).to(device) for layer in layers),
        schemes=tuple(layer.scheme for layer in layers),
        inputs=torch.cat(seen.some),
        mean=seen.sums / seen.num_tokens,
        largest=seen.largest,
        channel=group.channel.to(device),
        round_weight=lambda which, weight: round_weight(weight, layers[which].scheme),
        round_inputs=input_rounding(run.recipe.activations),
    )


def input_rounding(section: ActivationsSection | None) -> RoundInputs:
    """Return what the recipe's activations are quantized by: with a static scale, its range."""
    if section is None:
        return lambda inputs, _largest: inputs

    def rounded(inputs: Tensor, largest: Tensor) -> Tensor:
        if section.granularity == "token":
            return fake_quantize(inputs, section.scheme(None))
        seen = Magnitudes.none(inputs.device)
        seen.add(largest if section.range == "max" else inputs)
        return fake_quantize(inputs, section.scheme(step_of(section, seen)))

    return rounded
