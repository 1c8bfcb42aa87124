"""Where a search stands: the model, quantized up to a unit, and what it is measured on."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from qtool.base import Progress
from qtool.checkpoint.manifest import codec
from qtool.choosing.search.units import SearchUnit, Setting
from qtool.core.activations import fake_quantize
from qtool.core.magnitudes import Magnitudes
from qtool.data.calibration import CalibrationSet, batches
from qtool.errors import DataError
from qtool.modeling.load import load_source
from qtool.recipe.search import SearchSection
from qtool.scheme import ActivationScheme, StaticInputs
from qtool.steps.activation_ranges import static_scheme
from qtool.steps.plan import LayerPlan, load_method
from qtool.steps.run import Run
from qtool.steps.solve_table import solve_alone
from qtool.walk.partial_runs import PartialRuns

LOSS_TOKENS = 2048
FEWEST = 2
"""Samples that decide: a standard error takes two."""


@dataclass(slots=True)
class Track:
    """Samples, and how far both models have come with them, batch by batch."""

    tokens: list[Tensor]  # each (samples, length) int64
    inputs: list[Tensor] = field(default_factory=list)
    """Of the block where the search stands, in the quantized model: (samples, length, width)."""
    targets: list[Tensor] = field(default_factory=list)
    """Outputs of that block in the original."""
    said: list["Said"] = field(default_factory=list)
    """By the original."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a model predicts of a batch."""

    chances: Tensor
    """(samples, length, vocabulary) float32."""
    entropy: Tensor
    """Of each token, (samples, length) float32, in nats."""

    @classmethod
    def of(cls, logits: Tensor) -> "Said":
        """Take logits, (samples, length, vocabulary)."""
        logs = logits.float().log_softmax(-1)
        chances = logs.exp()
        return cls(chances, -(chances * logs).sum(-1))

    def divergences(self, logits: Tensor) -> Tensor:
        """Return the mean over its tokens of KL(this || logits) of each sample: float64, in nats.

        As a cross entropy less the entropy: that takes one exponential per logit.
        """
        logits = logits.float()
        met = torch.einsum("slv,slv->sl", self.chances, logits)
        crossed = logits.logsumexp(-1) - met
        return (crossed.double() - self.entropy).mean(1).cpu()


class Stage:
    """Holds the one model of a search, whose layers become quantized unit by unit.

    Nothing is loaded before something is measured, and then the stage catches up with what was
    frozen by then, as `walk.walk` does: a run that goes on measures what it would have measured.
    Layers behind the unit are the original's.
    """

    def __init__(self, run: Run, section: SearchSection) -> None:
        """Stand before the first block.

        Raises:
            DataError: there are too few samples.
        """
        self._run = run
        samples = run.calibration
        asked = run.recipe.calibration
        assert samples is not None and asked is not None
        learned, held_out = samples.split(asked.holdout)
        self._tracks = [
            Track(batches(cut_evenly(part, section), LOSS_TOKENS)) for part in (learned, held_out)
        ]
        self._frozen: dict[int, list[tuple[SearchUnit, Setting]]] = defaultdict(list)
        self._runs: PartialRuns | None = None
        self._index = 0
        self._now: dict[str, LayerPlan] = {}
        self._squares: dict[str, Tensor] = {}
        self._seen: dict[str, Magnitudes] = {}
        self._schemes: dict[str, ActivationScheme | None] = {}

    def error(self, unit: SearchUnit, setting: Setting) -> float:
        """Return the relative squared error of the outputs of a unit's block."""
        runs = self._enter(unit)
        self._set(unit.under(setting))
        wrong = power = 0.0
        track = self._tracks[0]
        for tokens, hidden, target in zip(track.tokens, track.inputs, track.targets, strict=True):
            output = runs.output(tokens, unit.block, hidden).float()
            wrong += float((output - target.float()).square().sum())
            power += float(target.float().square().sum())
        return wrong / power

    def losses(self, unit: SearchUnit, setting: Setting, *, held_out: bool) -> Tensor:
        """Return KL(original || quantized up to a unit), nats per token of each sample: float64."""
        self._enter(unit)
        self._set(unit.under(setting))
        return self._losses(unit.block, held_out=held_out)

    def freeze(self, unit: SearchUnit, setting: Setting) -> None:
        """Take what was decided of a unit: those behind it are to see what it does."""
        self._frozen[unit.block].append((unit, setting))
        if self._runs is not None and self._index == unit.block:
            self._take(self._runs, unit, setting)

    def final_losses(self, units: Sequence[SearchUnit], settings: Sequence[Setting]) -> Tensor:
        """Return the held-out losses of the whole quantized model, once all is frozen."""
        self._enter(units[-1])
        for unit, setting in zip(units, settings, strict=True):
            self._set(unit.under(setting))
        return self._losses(0, held_out=True)

    def _losses(self, index: int, *, held_out: bool) -> Tensor:
        runs, track = self._runs, self._tracks[held_out]
        assert runs is not None
        found = []
        for batch, (tokens, said) in enumerate(zip(track.tokens, track.said, strict=True)):
            hidden = track.inputs[batch] if index else runs.inputs(tokens)
            found.append(said.divergences(runs.logits(tokens, index, hidden)))
        return torch.cat(found)

    def _enter(self, unit: SearchUnit) -> PartialRuns:
        """Go on to the block of a unit, with all that was frozen before."""
        if self._runs is None:
            self._runs = self._begin()
            self._arrive(self._runs)
        while self._index < unit.block:
            for track in self._tracks:
                track.inputs = self._through(self._runs, track, track.inputs)
            self._index += 1
            self._arrive(self._runs)
        self._look(self._runs, unit)
        return self._runs

    def _begin(self) -> PartialRuns:
        """Load the original and write down what it says."""
        source, env = self._run.source, self._run.env
        env.emit(Progress("loading the original"))
        model = load_source(source, env.device).requires_grad_(requires_grad=False)
        runs = PartialRuns(model, source.adapter.blocks)
        for track in self._tracks:
            track.inputs = [runs.inputs(tokens) for tokens in track.tokens]
            track.targets = track.inputs
            pairs = zip(track.tokens, track.inputs, strict=True)
            track.said = [Said.of(runs.logits(tokens, 0, hidden)) for tokens, hidden in pairs]
        return runs

    def _arrive(self, runs: PartialRuns) -> None:
        """Run a block as the original has it, then take what was frozen of it."""
        for track in self._tracks:
            track.targets = self._through(runs, track, track.targets)
        for unit, setting in self._frozen[self._index]:
            self._take(runs, unit, setting)

    def _through(self, runs: PartialRuns, track: Track, inputs: list[Tensor]) -> list[Tensor]:
        pairs = zip(track.tokens, inputs, strict=True)
        return [runs.output(tokens, self._index, hidden) for tokens, hidden in pairs]

    def _take(self, runs: PartialRuns, unit: SearchUnit, setting: Setting) -> None:
        self._look(runs, unit)
        self._set(unit.under(setting))

    def _look(self, runs: PartialRuns, unit: SearchUnit) -> None:
        """Measure the inputs of layers whose methods or whose static steps need it, once.

        Of a Hessian it is the diagonal: so few samples give no more.
        """
        track = self._tracks[0]
        for layer in unit.layers:
            name, is_static = layer.name, isinstance(layer.activation, StaticInputs)
            needed = is_static or load_method(layer.method).needs
            if not needed or name in self._seen or name in self._squares:
                continue
            pairs = zip(track.tokens, track.inputs, strict=True)
            seen = torch.cat([runs.inputs_of(name, one, unit.block, x) for one, x in pairs])
            if is_static:
                self._seen[name] = Magnitudes.none(seen.device)
                self._seen[name].add(seen)
            if load_method(layer.method).needs:
                self._squares[name] = seen.float().square().mean(0)

    @torch.no_grad()
    def _set(self, layers: Sequence[LayerPlan]) -> None:
        """Give layers the weights, and the quantizers of their inputs, that plans make."""
        for layer in layers:
            before = self._now.get(layer.name)
            if before == layer:
                continue
            self._now[layer.name] = layer
            self._quantize_inputs(layer)
            if before is not None and replace(before, activation=layer.activation) == layer:
                continue  # its weight stays
            source, env = self._run.source, self._run.env
            weight = source.read_weight(layer.name).to(env.device)
            squares = self._squares.get(layer.name)
            tensor = solve_alone(
                layer, weight, env, None if squares is None else squares.diag()
            ).tensor
            values = codec(tensor.format).dequantize(tensor, torch.float32)
            parameter = self._module(layer.name).get_parameter("weight")
            parameter.copy_(values.T if source.adapter.conv1d else values)

    def _quantize_inputs(self, layer: LayerPlan) -> None:
        name, known = layer.name, layer.activation
        scheme = self._static(name, known) if isinstance(known, StaticInputs) else known
        if name not in self._schemes and scheme is not None:

            def quantized(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                now = self._schemes[name]
                return arguments if now is None else (fake_quantize(arguments[0], now),)

            self._module(name).register_forward_pre_hook(quantized)
        self._schemes[name] = scheme

    def _static(self, name: str, known: StaticInputs) -> ActivationScheme:
        section = self._run.recipe.activations
        assert section is not None
        return static_scheme(section, known, self._seen[name])

    def _module(self, name: str) -> nn.Module:
        assert self._runs is not None
        module: nn.Module = self._runs.model.get_submodule(name)
        return module


def cut_evenly(samples: CalibrationSet, section: SearchSection) -> list[Tensor]:
    """Return pieces of calibration samples, spread evenly over them: each (length,) int64.

    Raises:
        DataError: there are too few for choices to be checked.
    """
    length = min(section.sequence_length, max(map(len, samples.samples)))
    cut = [
        piece
        for sample in samples.samples
        for piece in sample.split(length)
        if len(piece) == length
    ]
    if len(cut) < FEWEST:
        raise DataError(
            f"search decides by at least {FEWEST} held-out samples of {length} tokens, and there "
            f"is {len(cut)}. Use more samples (calibration.num_samples, calibration.holdout), or "
            "shorter ones (search.sequence_length)."
        )
    count = min(section.samples, len(cut))
    return [cut[(2 * place + 1) * len(cut) // (2 * count)] for place in range(count)]
