"""The nouns of qtool: frozen data and protocols, no logic.

A quantized weight is data (`QuantizedTensor`), a method is a function from a `LayerProblem` to a
`LayerSolution`, a codec says what stored parts mean, a backend executes them. It needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from qtool.scheme import ActivationScheme, Shape2D, WeightScheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qtool.core.parts import Parts

Statistic = Literal["hessian"]
DType = Literal["int32", "float16", "bfloat16", "float32"]
CausalModel = Any  # of transformers; what all of them have is in no type
Tokenizer = Any  # of transformers, likewise
ModelConfig = Any  # likewise
ModelPart = Any  # likewise: a block, its attention, a linear
BackendWeight = Any  # what a backend made of a weight: nobody else looks into it


@dataclass(frozen=True, slots=True)
class Progress:
    """What is going on, and how far it is."""

    what: str  # one step of the work; the first with this text begins it
    done: int = 0
    total: int | None = None  # nothing is counted
    detail: str = ""  # on what was done last


@dataclass(frozen=True, slots=True)
class Notice:
    """A warning: the work goes on, and the user should know."""

    message: str


@dataclass(frozen=True, slots=True)
class Fallback(Notice):
    """Memory was full, and from now on the same is done in smaller parts."""


Emit = Callable[[Progress | Notice], None]
"""Receives what a user is told while the work goes on; the CLI renders, tests collect."""


def ignore_events(_event: Progress | Notice) -> None:
    """Drop an event: the default `Emit` of a library call."""


@dataclass(frozen=True, slots=True)
class PartSpec:
    """Shape and dtype of one stored part, known without its data."""

    dtype: DType
    shape: tuple[int, ...]
    lowest: float = float("-inf")
    """No stored value is below; none is infinite or NaN."""
    counts: tuple[int, ...] = ()
    """Of packed numbers (bits, words): how often 0, 1, ... occur; empty: anything may."""
    is_order: bool = False  # each number from 0 on occurs once


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A quantized weight: exactly what a checkpoint stores, and nothing else."""

    format: str  # name of the codec, such as `binary_coding`
    scheme: WeightScheme
    shape: Shape2D
    parts: Mapping[str, Tensor]
    """Tensors by part name, with the shapes and dtypes that the codec's `layout` gives."""


@dataclass(frozen=True, slots=True)
class Trainable:
    """A quantized weight whose group parameters can be learned, and its codes moved.

    Shapes are those of rows of groups, see `core.grouping`.
    """

    parameters: Mapping[str, Tensor]
    """By part name, (..., rows, num_groups) float32: where learning starts."""
    units: Mapping[str, Tensor]
    """Broadcastable to each parameter: what moves a group's outermost level by about one step."""
    codes: Tensor
    """(rows, num_groups, group_size) uint8, the last group filled up; or what makes `signs`."""
    planes: Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]]
    """(parameters) -> plane scales (num_bits, rows, num_groups), not negative and descending, and
    offsets (rows, num_groups), float32, differentiable in the parameters: with the codes what
    `Codec.dequantize` gives, but for rounding to float16; coarser rounding is passed through."""
    stored: Callable[[Mapping[str, Tensor], Tensor], QuantizedTensor]
    """(parameters, codes) -> the weight as a checkpoint stores it."""
    signs: Callable[[Tensor, float], Tensor] | None = None
    """Of codes that are stored bits: (latent values, sharpness) -> (num_bits, *rows of groups)."""


@dataclass(frozen=True, slots=True)
class Codec:
    """What the parts of one format are, and what they mean."""

    version: int
    layout: Callable[[WeightScheme, Shape2D], Mapping[str, PartSpec]]
    """Parts of a weight, from scheme and shape alone: for plans, headers and checks."""
    dequantize: Callable[[QuantizedTensor, torch.dtype], Tensor]
    """The definition of the format: (out_features, in_features) in a float dtype."""
    cat: Callable[[Sequence[QuantizedTensor], int], QuantizedTensor]
    """(weights, dimension) -> one below the other, or beside one another, to the bit, if need be in
    another format; raises `SchemeError` where a group would run on from one to the next."""
    narrow: Callable[[QuantizedTensor, int, int, int], QuantizedTensor]
    """(weight, dimension, start, length) -> a part, to the bit; `SchemeError` if a group is cut."""
    trainable: Callable[[QuantizedTensor], Trainable] | None = None
    """Where learning starts from a weight; None: weights of this format can't be tuned."""
    opened: Callable[[QuantizedTensor], QuantizedTensor] | None = None
    """To the bit the same in a format that backends run; no parts if it has none. None: in this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProblem:
    """All that a method may look at: no model, no files, no globals."""

    name: str  # dotted, of the layer, for messages
    weight: Tensor
    """(out_features, in_features) float32, finite."""
    scheme: WeightScheme
    statistics: Mapping[Statistic, Tensor] = field(default_factory=dict)
    """Only what the method asked for in `needs`, or `uses` where it was calibrated."""
    generator: torch.Generator | None = None


@dataclass(frozen=True, slots=True)
class LayerSolution:
    """What a method returns for one layer."""

    tensor: QuantizedTensor
    metrics: Mapping[str, float]
    """`nmse` and others: logged and compared, never steering."""
    fallback: str | None = None
    """One sentence if the solver couldn't do what was asked and did something simpler."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """The extension point: one file in `qtool/methods` with the constant METHOD."""

    summary: str
    """One sentence for `qtool methods`."""
    options: type
    """Frozen dataclass; its fields are the recipe's keys and the documentation's table."""
    solve: Callable[[LayerProblem, Any], LayerSolution]
    layout: Callable[[WeightScheme, Shape2D, Any], Mapping[str, PartSpec]]
    """(scheme, shape, options) -> the parts that `solve` will return, for `--dry-run`."""
    num_bits: range = range(1, 9)  # bit widths that it supports
    needs: frozenset[Statistic] = frozenset()  # statistics that it can't do without
    uses: frozenset[Statistic] = frozenset()  # statistics that it does better with
    writes: Callable[[Any], str] = lambda _options: "affine"  # options -> format of the result
    is_tunable: bool = True  # that has `Codec.trainable`


Passage = Literal["norm", "attention", "heads", "gate", "activation"]
"""From a producer to its consumers: a norm; attention, the values being the last rows of a linear,
or of each head's; a product of its last rows with a gate; a function per channel."""


@dataclass(frozen=True, slots=True)
class Producer:
    """What makes the inputs of linears and can divide them by a factor per channel."""

    name: str  # dotted, in the block
    through: Passage = "norm"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelAdapter:
    """Where the parts of a model family are: dotted names only.

    One file in `qtool/modeling/families`, named as the `model_type` of config.json, with the
    constant ADAPTER.
    """

    blocks: str
    """Dotted name of the list of decoder blocks, such as `model.layers`."""
    linears: tuple[tuple[str, ...], ...]
    """Of any block, in the order of execution; a tuple holds those sharing an input."""
    embedding: str
    head: str = "lm_head"
    base_prefix: str = "model"
    """Prefix that checkpoints saved from the base model leave out."""
    residual: tuple[str, str] | None = None
    """Linears whose outputs a block adds to its input as they are, of attention, then of the MLP;
    None: there are others, or something else comes between, such as a norm."""
    conv1d: bool = False
    """True where the weights are stored as (in_features, out_features), as in GPT-2."""
    producers: tuple[Producer, ...] = ()
    """What makes the inputs of each tuple of `linears`, in their order; empty: nobody has said."""
    norm_offset: float = 0.0  # what norms add to their stored weight: 1 in Gemma
    sensitive: tuple[str, ...] = ()  # of `linears`, in 16 bit unless an override names them


@dataclass(frozen=True, slots=True)
class Env:
    """The only side channel of a stage."""

    device: str
    seed: int = 0
    emit: Emit = ignore_events
    work_dir: Path | None = None
    """Takes what is too large for memory, for as long as a step runs."""
    parts: Parts | None = None  # that work is done in once memory was full


@dataclass(frozen=True, slots=True)
class Fused:
    """Weights that share an input, prepared as one, so that they are there once."""

    prepared: BackendWeight
    parts: tuple[Any, ...]
    """By weight, its part of it as `matmul` takes it; None: that one needs a layout of its own."""


class IntegerProduct(Protocol):
    """A weight that a backend multiplies by quantized inputs as integers."""

    @property
    def fewest_tokens(self) -> int:
        """Return from how many on that is faster than `KernelBackend.matmul`."""
        ...

    def linear(self, x: Tensor, scheme: ActivationScheme) -> Tensor:
        """Return x @ W.T, x quantized: (tokens, in_features) -> (tokens, out_features).

        In the dtype of `x`. Codes are those of `core.activations.quantize_activations`.
        """
        ...


class KernelBackend(Protocol):
    """Executes quantized weights; one file in `qtool/runtime/backends`, constant BACKEND.

    What it prepares is a tensor, the weight itself, or has a method `dense` that returns it.
    """

    name: str  # its file's
    priority: int
    """Of the backends that support a tensor, the one with the highest priority runs it."""
    owns_layout: bool
    """What `prepare` returns is all that it needs, so that the module's parts may leave the device:
    it holds itself those that are read as they are stored, as some kernels of `cuda` do."""
    decodes_on: str
    """Type of the devices on which `generate` runs its `decode_ops` unless it is told otherwise."""

    def why_not(self, tensor: QuantizedTensor, device: torch.device) -> str | None:
        """Return None if it can execute `tensor` on `device`, else a sentence that says why not."""
        ...

    def prepare(self, tensor: QuantizedTensor, dtype: torch.dtype) -> BackendWeight:
        """Re-lay the parts once, at load; the result is passed back to `matmul` and `rows`."""
        ...

    def matmul(self, x: Tensor, prepared: BackendWeight) -> Tensor:
        """Return x @ W.T, shaped (..., out_features), in the dtype of `x`."""
        ...

    def rows(self, index: Tensor, prepared: BackendWeight) -> Tensor:
        """Return the rows of W that `index` names, shaped (*index.shape, in_features)."""
        ...

    def integer_product(self, tensor: QuantizedTensor, dtype: torch.dtype) -> IntegerProduct | None:
        """Prepare a weight for inputs that are quantized; None: it has no better way for these.

        Then such inputs go through `matmul`, see `core.activations.multiply_quantized`. `dtype` is
        that of the activations.
        """
        ...

    def fuse(
        self, tensors: Sequence[QuantizedTensor], dtype: torch.dtype, *, interleave: bool = False
    ) -> Fused | None:
        """Prepare weights that share an input as one, for `decode_ops`; None: they stay apart.

        Args:
            tensors: Queries, keys and values; or gate and up.
            dtype: Of the activations.
            interleave: They are gate and up, whose rows may alternate if `decode_ops` wants it.
        """
        ...

    def decode_ops(self, weights: Any) -> Any:  # noqa: ANN401
        """Return the `DecodeOps` that run `DecoderWeights` of its weights; None: it has none."""
        ...
