"""A block that is quantized linear by linear: what is final in it isn't run again.

Each group of linears is measured by a run of the block, up to them, and one more gives the inputs
of the next block. Attention is the same in the last three of these, and what goes into the last
linear of the MLP in the last two. All else runs, on the very same numbers: so the results are those
of whole runs, to the bit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from qtool.scheme import ActivationScheme
from qtool.walk.calls import Call
from qtool.walk.filled_block import Block
from qtool.walk.remembered import RememberingBlock, can_remember


class ReplayingBlock(Block):
    """A block whose batches stay as they are while its linears change."""

    def __init__(self, block: Block, linears: Sequence[str], residual: tuple[str, str]) -> None:
        """Take a block over.

        Args:
            block: The one that is quantized.
            linears: All that statistics are measured for, by name.
            residual: Linears whose outputs go into the residual stream, of attention, then of the
                MLP; its sum with that of the latter is the block's output.
        """
        super().__init__(block.module, *block.how_it_runs())
        of_attention, self._last = residual
        self._attention = of_attention.rpartition(".")[0]
        inside = f"{self._attention}."
        self._between = tuple(
            name for name in linears if name != self._last and not name.startswith(inside)
        )
        if not self._attention or self._last.startswith(inside):
            self._attention = ""
        self._attended: dict[int, Any] = {}
        """What attention returned, by batch."""
        self._last_inputs: dict[int, Tensor] = {}
        self._at: tuple[int, Tensor, bool] | None = None
        """The batch that is run, its input, and whether only the last linear has changed."""

    @property
    def module(self) -> nn.Module:
        """The block, of which anything may change now."""
        self._forget("")
        return super().module

    def run(self, hidden: Tensor, batch: int) -> Tensor:
        """Return the block's output, as `Block.run`."""
        with self._on(batch, hidden, only_last=batch in self._last_inputs):
            return super().run(hidden, batch)

    def inputs_of(self, linear: str, hidden: Tensor, batch: int) -> Tensor:
        """Return the input of a linear, as `Block.inputs_of`."""
        if self._attention and linear.startswith(f"{self._attention}."):
            return super().inputs_of(linear, hidden, batch)
        with self._on(batch, hidden):
            return super().inputs_of(linear, hidden, batch)

    def around(self, linear: str, hidden: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Return input and residual stream of a linear, as `Block.around`."""
        with self._on(batch, hidden):
            found = super().around(linear, hidden, batch)
        if linear == self._last:
            self._last_inputs[batch] = found[0]
        return found

    def output(self, hidden: Tensor, call: Call) -> Tensor:
        """Return what comes out of it, as `Block.output`."""
        if self._at is None or hidden is not self._at[1]:  # in parts, or to learn
            return super().output(hidden, call)
        batch, _, only_last = self._at
        with ExitStack() as stack:
            if self._attention:
                stack.enter_context(self._attending(batch))
            if only_last:
                stack.enter_context(self._skipping_to_last(batch))
            return super().output(hidden, call)

    def set_weight(self, linear: str, weight: Tensor, *, transposed: bool) -> None:
        """Replace the weight of a linear, as `Block.set_weight`."""
        self._forget(linear)
        super().set_weight(linear, weight, transposed=transposed)

    def set_bias(self, linear: str, bias: Tensor) -> None:
        """Replace the bias of a linear, as `Block.set_bias`."""
        self._forget(linear)
        super().set_bias(linear, bias)

    def quantize_inputs(self, linear: str, scheme: ActivationScheme | None) -> None:
        """Quantize the inputs of a linear, as `Block.quantize_inputs`."""
        self._forget(linear)
        super().quantize_inputs(linear, scheme)

    def _forget(self, changed: str) -> None:
        """Drop what a linear that changes has a part in; empty: anything changes."""
        if changed != self._last:
            self._last_inputs.clear()
            if changed not in self._between:
                self._attended.clear()

    @contextmanager
    def _on(self, batch: int, hidden: Tensor, *, only_last: bool = False) -> Iterator[None]:
        self._at = batch, hidden, only_last
        try:
            yield
        finally:
            self._at = None

    @contextmanager
    def _attending(self, batch: int) -> Iterator[None]:
        """Replay attention, or note what it returns."""
        module = self._module.get_submodule(self._attention)
        if batch in self._attended:
            with _forward(module, lambda *_, **__: self._attended[batch]):
                yield
            return

        def note(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
            self._attended[batch] = output

        with module.register_forward_hook(note):
            yield

    @contextmanager
    def _skipping_to_last(self, batch: int) -> Iterator[None]:
        """Give the last linear its inputs; nobody else looks at what those before it return."""

        def give(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor]:
            return (self._last_inputs[batch].view(arguments[0].shape),)

        with ExitStack() as stack:
            for name in self._between:
                module = self._module.get_submodule(name)
                stack.enter_context(_forward(module, _nothing_from(module)))
            last = self._module.get_submodule(self._last)
            stack.enter_context(last.register_forward_pre_hook(give, prepend=True))
            yield


def saving_runs(
    block: Block,
    hidden: Sequence[Tensor],
    measured: Mapping[str, int],
    groups: Sequence[Sequence[str]],
    residual: tuple[str, str] | None,
    *,
    as_one: bool = False,
) -> tuple[Block, Block]:
    """Return a block as it was and a copy to quantize, which run nothing twice where they can.

    Args:
        block: As it was loaded.
        hidden: Its batches, each (samples, length, width).
        measured: Linears whose inputs are asked for, with their in_features.
        groups: All that may be quantized, by groups that share an input.
        residual: As `ReplayingBlock` takes it; None: no residual stream is looked at.
        as_one: The quantized model is taken to carry what the original does.
    """
    copy = block.copy("original" if as_one else "quantized")
    if not can_remember(hidden, measured.values()):
        return block, copy
    if residual is None:
        return RememberingBlock(block, tuple(measured), None), copy
    original = RememberingBlock(block, tuple(measured), residual[1])
    linears = [name for group in groups for name in group]
    return original, ReplayingBlock(copy, linears, residual)


@contextmanager
def _forward(module: nn.Module, replacement: Callable[..., Any]) -> Iterator[None]:
    """Let a module return something without doing anything."""
    module.forward = replacement
    try:
        yield
    finally:
        del module.forward  # that of its class is left


def _nothing_from(linear: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what gives zeros in the shape of a linear's outputs."""
    weight = linear.get_parameter("weight")
    outputs = weight.shape[0 if isinstance(linear, nn.Linear) else 1]  # `Conv1D` is transposed
    return lambda inputs: inputs.new_zeros(*inputs.shape[:-1], outputs)
