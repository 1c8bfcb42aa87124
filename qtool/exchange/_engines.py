"""Which weights of a format an engine has kernels for.

Sources: vLLM 0.33.0, `layers/quantization/auto_gptq.py`, `utils/{marlin,machete}_utils.py`,
`kernels/linear/mixed_precision/*.py` and the schemes of `compressed_tensors`; read, not run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qtool.checkpoint.manifest import LayerEntry
from qtool.errors import UnknownNameError
from qtool.plugins import check_name
from qtool.scheme import WeightScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """What an engine takes of one format."""

    symmetric: tuple[int, ...]
    """Bits of weights without zero points."""
    asymmetric: tuple[int, ...]
    """Bits of weights with zero points."""
    group_sizes: tuple[int | None, ...]
    """None: one group per row."""
    multiple: int = 1
    """Of which in_features and out_features are."""
    ordered: bool = False
    """Takes inputs that are sorted by group."""
    activations: bool = False
    """Takes inputs of 8 bits, a step per token, with symmetric weights of 8 bits per row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignEngine:
    """A program that serves models."""

    version: str
    """The one that was read; others may differ."""
    formats: Mapping[str, Kernels] = field(default_factory=dict)
    """By the name of the exchange; `dense` goes everywhere."""


PER_ROW = None
MARLIN = (PER_ROW, 32, 64, 128)
ENGINES: Mapping[str, ForeignEngine] = {
    "vllm": ForeignEngine(
        version="0.33",
        formats={
            "gptq": Kernels(symmetric=(4, 8), asymmetric=(), group_sizes=MARLIN, multiple=64),
            "compressed-tensors": Kernels(
                symmetric=(4, 8),
                asymmetric=(4,),
                group_sizes=MARLIN,
                multiple=64,
                activations=True,
            ),
            "dense": Kernels(symmetric=(), asymmetric=(), group_sizes=()),
        },
    ),
    "transformers": ForeignEngine(
        version="5",
        formats={
            "gptq": Kernels(
                symmetric=(2, 3, 4, 8),
                asymmetric=(2, 3, 4, 8),
                group_sizes=(PER_ROW, 16, 32, 64, 128, 256, 512, 1024),
                multiple=32,
                ordered=True,
            ),
            "compressed-tensors": Kernels(
                symmetric=tuple(range(2, 9)),
                asymmetric=tuple(range(2, 9)),
                group_sizes=(PER_ROW, 16, 32, 64, 128, 256),
                activations=True,
            ),
            "dense": Kernels(symmetric=(), asymmetric=(), group_sizes=()),
        },
    ),
}


def kernels_of(engine: str, target: str) -> Kernels:
    """Return what an engine, as `--engine` names it, takes of a format.

    Raises:
        UnknownNameError: there is no such engine, it is known in another version, or doesn't read
            the format.
    """
    name, _, version = engine.partition("@")
    check_name(name, tuple(ENGINES), "engines")
    known = ENGINES[name]
    if version and not (version == known.version or version.startswith(f"{known.version}.")):
        raise UnknownNameError(
            f"What {name}@{version} takes isn't known; {name}@{known.version} is. Give that, or "
            "leave out --engine."
        )
    check_name(target, tuple(known.formats), f"what {name} reads")
    return known.formats[target]


def why_no_kernel(kernels: Kernels, entry: LayerEntry) -> str | None:
    """Return why no kernel takes a layer, as a clause, or None."""
    if not kernels.group_sizes:
        return None
    reasons = (_wrong_bits(kernels, entry.scheme), _wrong_groups(kernels, entry))
    found = next((reason for reason in reasons if reason is not None), None)
    if found is not None:
        return found
    if "input_order" in entry.layout() and not kernels.ordered:
        return "its inputs are sorted by group, and they must be as they come"
    if entry.activation is not None and not kernels.activations:
        return "its inputs are quantized"
    return None


def _wrong_bits(kernels: Kernels, scheme: WeightScheme) -> str | None:
    bits = kernels.symmetric if scheme.symmetric else kernels.asymmetric
    if scheme.num_bits in bits:
        return None
    kind = "symmetric" if scheme.symmetric else "asymmetric"
    other = ", ".join(map(str, kernels.symmetric))
    meant = f"it takes {kind} ones of {', '.join(map(str, bits))} bits"
    if not bits:
        meant = f"it takes symmetric ones of {other} bits alone"
    return f"it is {kind} with {scheme.num_bits} bits, and {meant}"


def _wrong_groups(kernels: Kernels, entry: LayerEntry) -> str | None:
    size, shape = entry.scheme.group_size, entry.shape
    whole = size is None or shape.in_features % size == 0
    if size not in kernels.group_sizes or not whole:
        sizes = ", ".join("row" if one is None else str(one) for one in kernels.group_sizes)
        return f"its groups have {size or 'a row'} of {shape.in_features} inputs; {sizes} are meant"
    if any(length % kernels.multiple for length in shape):
        return f"its shape is {tuple(shape)}; multiples of {kernels.multiple} are meant"
    return None
