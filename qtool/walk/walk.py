"""The walk through the decoder blocks: what a linear sees in the model quantized before it.

It is lazy: nothing is captured, loaded or run before somebody asks for statistics, and then it
catches up with the layers that are solved by then. So a run that goes on after a stop measures what
is left to solve, and need not know what was solved before.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qtool.base import Env, Notice, Progress
from qtool.core.experts import expert_name
from qtool.core.moments import Moments
from qtool.data.calibration import CalibrationSet, batches
from qtool.errors import MethodError
from qtool.modeling.source import ModelSource
from qtool.recipe.calibration import CalibrationSection
from qtool.scheme import ActivationScheme, Shape2D
from qtool.walk.blocks import BlockModel
from qtool.walk.filled_block import Block
from qtool.walk.replayed import saving_runs
from qtool.walk.routed import ExpertStatistics, RoutedTokens, route
from qtool.walk.solved import NO_RULES, InputRules, SolvedLinear
from qtool.walk.statistics import (
    FEW_TOKENS,
    InputStatistics,
    RowGroups,
    why_not_finite,
)
from qtool.walk.streams import Streams, Visit, make_streams
from qtool.walk.sums import SumOptions, SumPlace, measure_inputs, sum_inputs

BATCH_TOKENS = {"cuda": 8192, "cpu": 2048}


class Walk:
    """Goes from block to block as far as statistics are asked for, and never back."""

    def __init__(
        self,
        source: ModelSource,
        layers: Mapping[str, Shape2D],
        samples: CalibrationSet,
        section: CalibrationSection,
        env: Env,
        rules: InputRules = NO_RULES,
    ) -> None:
        """Begin before the first block.

        Args:
            source: The original.
            layers: Those to quantize, with their shapes; others of the blocks stay as they are.
            samples: What the blocks see.
            section: How the recipe uses them.
            env: Where blocks run; its `work_dir` takes their inputs if the recipe says so.
            rules: What the recipe does with the inputs of linears.
        """
        self._source, self._samples = source, samples
        self._section, self._env, self._share = section, env, rules.share
        self._residual = source.residual if section.residual_error else None
        self._groups = dict(_groups(source, layers, apart=rules.weigh is not None))
        self._sharing = Counter(self._groups.values())
        self._rules, self._weighed = rules, dict[str, RowGroups]()
        self._shapes = {name: layers[name] for name in self._groups}
        self._solved: dict[int, dict[str, SolvedLinear]] = defaultdict(dict)
        self._route: tuple[BlockModel, Streams] | None = None
        self._index = 0
        self._blocks: tuple[Block, Block] | None = None
        """The block as it was, and as far as it is quantized."""
        self._measured: tuple[tuple[int, str], tuple[InputStatistics, ...]] | None = None
        self._routed: tuple[tuple[int, str], RoutedTokens] | None = None

    def group(self, layer: str) -> tuple[int, str]:
        """Return the block of a linear and the first one there that has its input."""
        return self._groups[layer]

    def statistics(self, layer: str) -> tuple[InputStatistics, ...]:
        """Return what a linear of the blocks sees, for each group of its output channels.

        Without such groups it is measured once for all linears that share the input.

        Raises:
            MethodError: its inputs aren't finite.
        """
        group = self._groups[layer]
        if self._measured is not None and self._measured[0] == group:
            return self._measured[1]
        self._measured = None  # its memory is needed
        found = self._measure(*group)
        if self._sharing[group] == 1:
            return tuple(replace(each, is_for_one=True) for each in found)
        self._measured = (group, found)
        return found

    def expert_statistics(self, layer: str) -> ExpertStatistics:
        """Return what a layer of one expert, by its name, can be solved for.

        Raises:
            MethodError: its inputs aren't finite.
        """
        index, inner = self._groups[layer]
        visit = self.visit(index)
        expert = expert_name(inner)
        assert expert is not None
        if self._routed is None or self._routed[0] != (index, expert.module):
            self._routed = None  # its memory is needed
            self._routed = (index, expert.module), route(visit, expert.module)
        tokens = self._routed[1]
        found = tokens.measure(
            expert,
            visit,
            token_cap=self._section.token_cap,
            activation=self._rules.scheme(layer, tokens.inputs_of(expert, visit)),
        )
        if not found.is_finite:
            raise self._not_finite(layer, visit.streams)
        return found

    def visit(self, index: int) -> Visit:
        """Return a block with all that its linears' solutions are judged by: for tuning.

        Args:
            index: Of the block; as all that is asked of a walk, no earlier than the last one.
        """
        model, streams = self._route = self._route or self._begin()
        self._measured = None
        self._go_to(index, model, streams)
        assert self._blocks is not None
        return Visit(*self._blocks, streams)

    def put(self, layer: str, solved: SolvedLinear) -> None:
        """Take a linear, by its name, that is solved: those after it are to see what it does."""
        index, _ = self._groups[layer]
        self._solved[index][layer] = solved
        in_place = self._section.prefix == "linears"
        if in_place and self._blocks is not None and index == self._index:
            self._set(layer)

    def correct(self, layer: str, bias: Tensor) -> None:
        """Take another bias of a linear that is solved, by its name."""
        index, _ = self._groups[layer]
        self.put(layer, replace(self._solved[index][layer], bias=bias))

    def end(self) -> None:
        """Let go of all that is large."""
        self._route = self._blocks = self._measured = self._routed = None

    def _measure(self, index: int, linear: str) -> tuple[InputStatistics, ...]:
        model, streams = self._route = self._route or self._begin()
        self._go_to(index, model, streams)
        assert self._blocks is not None
        name = f"{self._source.adapter.blocks}.{index}.{linear}"
        visit = Visit(*self._blocks, streams)
        options = SumOptions(
            residual=self._residual,
            token_cap=self._section.token_cap,
            groups=self._weighed.get(name),
            activation=self._rules.scheme(name, self._inputs(name, linear, visit)),
        )
        statistics = measure_inputs(linear, visit, options)
        if not all(each.is_finite() for each in statistics):
            raise self._not_finite(name, streams)
        return statistics

    def sums(
        self, layer: str, chunk: int
    ) -> tuple[dict[SumPlace, Moments], ActivationScheme | None]:
        """Return the sums of a chunk of the share for what a linear of the blocks sees.

        And how its inputs were quantized. Nothing, if the share has no samples.
        """
        model, streams = self._route = self._route or self._begin()
        if not streams.original:
            return {}, None
        index, linear = self._groups[layer]
        self._go_to(index, model, streams)
        assert self._blocks is not None
        section, visit = self._section, Visit(*self._blocks, streams, chunk)
        scheme = self._rules.scheme(layer, self._inputs(layer, linear, visit))
        options = SumOptions(
            residual=self._residual,
            token_cap=section.token_cap,
            activation=scheme,
        )
        return dict(sum_inputs(linear, visit, options)), scheme

    def _inputs(self, name: str, linear: str, visit: Visit) -> Iterator[Tensor]:
        """Yield what a linear of the quantized block sees of the samples that aren't held out."""
        streams = visit.streams
        for index, hidden in enumerate(streams.quantized[: streams.num_train]):
            x = visit.quantized.inputs_of(linear, hidden, index)
            if not bool(torch.isfinite(x).all()):
                raise self._not_finite(name, streams)
            yield x

    def _not_finite(self, name: str, streams: Streams) -> MethodError:
        walked_in = streams.original[0].dtype
        return MethodError(why_not_finite(self._source, name, walked_in), layer=name)

    def _begin(self) -> tuple[BlockModel, Streams]:
        """Run what comes before the first block."""
        env, section = self._env, self._section
        if self._rules.weigh is not None:
            self._weighed = dict(self._rules.weigh())
        train, held_out = self._samples.split(section.holdout)
        self.warn_of_few_tokens(train.num_tokens)
        env.emit(Progress("capturing the inputs of the first block"))
        model = BlockModel(self._source, env.device, dtype=section.dtype, parts=env.parts)
        limit = BATCH_TOKENS[torch.device(env.device).type]
        chunks = section.chunks or 1
        first = self._share.of(batches(train.samples, limit), chunks)
        rest = self._share.of(batches(held_out.samples, limit), chunks)
        # Nothing here keeps what was captured: it would stay in memory for the whole walk.
        streams = make_streams(
            model.capture([*first.batches, *rest.batches]),
            len(first.batches),
            device=env.device,
            directory=env.work_dir if section.cache == "disk" else None,
            as_one=section.prefix == "original",
        )
        streams = replace(streams, chunks=(*first.chunks, *rest.chunks))
        env.emit(Progress("solving"))
        return model, streams

    def _go_to(self, index: int, model: BlockModel, streams: Streams) -> None:
        """Pass the blocks before one, and load that."""
        if index > self._index + 1:
            self._env.emit(Progress("passing the blocks that are finished"))
        while self._blocks is None or self._index < index:
            if self._blocks is None:
                block, measured = model.load(self._index), self._measured_of(self._index)
                linears, hidden = self._source.adapter.linears, streams.original
                self._blocks = saving_runs(
                    block, hidden, measured, linears, self._residual, as_one=streams.are_one
                )
                if self._section.prefix == "linears":
                    self._set_all()
            if self._index < index:
                self._routed = None
                if self._section.prefix == "block":
                    self._set_all()
                streams.advance(*self._blocks)
                self._solved.pop(self._index, None)
                self._blocks, self._index = None, self._index + 1

    def _measured_of(self, index: int) -> dict[str, int]:
        """Return the linears of a block whose inputs are asked for, with their in_features."""
        inner = {name for at, name in self._groups.values() if at == index}
        prefix = f"{self._source.adapter.blocks}.{index}"
        shapes = {name: self._shapes[f"{prefix}.{name}"] for name in sorted(inner)}
        return {name: s.in_features for name, s in shapes.items() if expert_name(name) is None}

    def _set_all(self) -> None:
        for layer in self._solved[self._index]:
            self._set(layer)

    def _set(self, layer: str) -> None:
        assert self._blocks is not None
        adapter = self._source.adapter
        inner = layer.removeprefix(f"{adapter.blocks}.{self._index}.")
        solved = self._solved[self._index][layer]
        self._blocks[1].set_weight(inner, solved.weight(), transposed=adapter.conv1d)
        self._blocks[1].quantize_inputs(inner, solved.activation)
        if solved.bias is not None:
            self._blocks[1].set_bias(inner, solved.bias)

    def warn_of_few_tokens(self, num_tokens: int) -> None:
        """Say once, before anything is solved, that there is too little data for some layers."""
        widths = sorted({shape.in_features for shape in self._shapes.values()})
        starved = [width for width in widths if num_tokens < FEW_TOKENS * width]
        if starved:
            message = (
                f"{num_tokens} calibration tokens are fewer than {FEW_TOKENS} per input for layers "
                f"of {' and '.join(map(str, starved))} inputs: their damping is raised. Use more "
                "or longer samples."
            )
            self._env.emit(Notice(message))


def _groups(
    source: ModelSource, layers: Mapping[str, Shape2D], *, apart: bool
) -> Iterator[tuple[str, tuple[int, str]]]:
    """Yield each quantized linear with its block and the first quantized one that has its input.

    With `apart` that is the linear itself: it weighs the tokens in its own way. So it is for
    a layer of an expert, which sees tokens of its own.
    """
    adapter = source.adapter
    for index in range(source.num_blocks):
        for names in adapter.linears:
            found = [name for name in names if f"{adapter.blocks}.{index}.{name}" in layers]
            for name in found:
                alone = apart or expert_name(name) is not None
                yield f"{adapter.blocks}.{index}.{name}", (index, name if alone else found[0])
