"""Shapes of known models, to time kernels and decoding without their weights. Torch-free."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qtool.plugins import check_name
from qtool.scheme import Shape2D, WeightScheme

HEAD_BITS = 4


@dataclass(frozen=True, slots=True)
class LinearShape:
    """Linears of one shape, those that share an input fused as the decode runner has them."""

    name: str
    shape: Shape2D
    count: int
    num_bits: int | None = None
    """None: what is asked for."""
    rows: tuple[tuple[int, int], ...] = ()
    """Bits and number of rows of each class of rows, as `WeightScheme.rows`; empty: all alike."""

    def scheme(self, asked: WeightScheme) -> WeightScheme:
        """Return what it has of what is asked for."""
        num_bits = self.rows[0][0] if self.rows else self.num_bits or asked.num_bits
        return WeightScheme(num_bits=num_bits, group_size=asked.group_size, rows=self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSizes:
    """What a whole model takes beside its linears."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float
    norm_eps: float = 1e-5

    def linears(self) -> dict[str, Shape2D]:
        """Return the shapes of a layer's projections, those that share an input fused."""
        hidden, inner = self.hidden_size, self.num_heads * self.head_dim
        qkv = inner + 2 * self.num_key_value_heads * self.head_dim
        return {
            "qkv": Shape2D(qkv, hidden),
            "o": Shape2D(hidden, inner),
            "gate_up": Shape2D(2 * self.intermediate_size, hidden),
            "down": Shape2D(hidden, self.intermediate_size),
        }


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model, or one block of it."""

    linears: tuple[LinearShape, ...]
    decoder: DecoderSizes | None = None
    """None: only kernels are timed."""


def _whole(decoder: DecoderSizes) -> ModelShape:
    layers = (LinearShape(n, s, decoder.num_layers) for n, s in decoder.linears().items())
    head = LinearShape("lm_head", Shape2D(decoder.vocab_size, decoder.hidden_size), 1, HEAD_BITS)
    return ModelShape((*layers, head), decoder)


def _one_layer(**shapes: tuple[int, int]) -> ModelShape:
    return ModelShape(tuple(LinearShape(n, Shape2D(*shape), 1) for n, shape in shapes.items()))


def _classes(rows: int, bits: Sequence[int], ratio: int = 2) -> tuple[tuple[int, int], ...]:
    """Return classes of rows, each `ratio` times as large as the one before it."""
    total = sum(ratio**power for power in range(len(bits)))
    counts = [rows * ratio**power // total for power in range(len(bits))]
    return tuple(zip(bits, [*counts[:-1], rows - sum(counts[:-1])], strict=True))


def _heads(shape: Shape2D) -> ModelShape:
    """Return heads of one shape: all rows alike, and rows of unlike bits."""
    alike = [LinearShape(f"{bits} bits", shape, 1, bits) for bits in (4, 3, 2)]
    mixed = [
        LinearShape(f"{'/'.join(map(str, bits))} bits", shape, 1, rows=_classes(shape[0], bits))
        for bits in ((8, 4, 3, 2), (4, 3, 2, 1), (4, 2))
    ]
    return ModelShape((*alike, *mixed))


LLAMA2_7B = DecoderSizes(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=11008,
    num_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    vocab_size=32000,
    rope_theta=10_000.0,
)
MODELS: dict[str, ModelShape] = {
    "llama3-8b": _whole(
        replace(
            LLAMA2_7B,
            intermediate_size=14336,
            num_key_value_heads=8,
            vocab_size=128256,
            rope_theta=500_000.0,
        )
    ),
    "llama2-7b": _whole(LLAMA2_7B),
    "llama2-70b": _whole(
        replace(
            LLAMA2_7B,
            num_layers=80,
            hidden_size=8192,
            intermediate_size=28672,
            num_heads=64,
            num_key_value_heads=8,
        )
    ),
    "llama2-70b-layer": _one_layer(
        qkv=(10240, 8192), o=(8192, 8192), gate_up=(57344, 8192), down=(8192, 28672)
    ),
    "llama3-8b-heads": _heads(Shape2D(128256, 4096)),
    "opt-175b-layer": _one_layer(
        qkv=(36864, 12288), o=(12288, 12288), fc1=(49152, 12288), fc2=(12288, 49152)
    ),
}


def find_shapes(name: str) -> ModelShape:
    """Return the shapes of a model.

    Raises:
        UnknownNameError: there are none of that name.
    """
    check_name(name, tuple(MODELS), "shapes")
    return MODELS[name]
