"""Linears whose inputs are quantized, timed as modules beside float16 cuBLAS."""

import copy
from dataclasses import dataclass
from functools import partial

import torch

from qtool.base import QuantizedTensor
from qtool.checkpoint.manifest import LayerEntry
from qtool.formats.affine import encode_affine
from qtool.runtime.modules import QuantizedLinear
from qtool.scheme import ActivationScheme, Shape2D, WeightScheme
from qtool.timing.kernels import Rig, SweepPoint, inputs
from qtool.timing.shapes import ModelShape
from qtool.timing.synthetic import DTYPE, generator_on, random_dense
from qtool.timing.timing import copies_needed, rotation, time_calls

MANY_TOKENS = (1, 16, 512, 2048, 4096, 8192)
WEIGHT_KINDS = (
    WeightScheme(num_bits=4, group_size=128),
    WeightScheme(num_bits=4, group_size=None),
    WeightScheme(num_bits=8, group_size=None, symmetric=True),
)
"""That meet quantized inputs: in groups, and with one scale per row."""


@dataclass(frozen=True, slots=True)
class InputCase:
    """One linear to be timed."""

    name: str
    entry: LayerEntry


@dataclass(frozen=True, slots=True)
class InputTimes:
    """What was timed of it; includes the quantization of its inputs."""

    name: str
    out_features: int
    in_features: int
    num_bits: int
    """Of weights."""
    group_size: int | None
    input_bits: int
    granularity: str
    points: tuple[SweepPoint, ...]


def input_cases(shape: ModelShape, activation: ActivationScheme) -> tuple[InputCase, ...]:
    """Return the linears of the blocks of a model, with each kind of weight."""
    return tuple(
        InputCase(linear.name, _entry(linear.shape, scheme, activation))
        for linear in shape.linears
        if linear.num_bits is None and not linear.rows
        for scheme in WEIGHT_KINDS
    )


def _entry(shape: Shape2D, scheme: WeightScheme, activation: ActivationScheme) -> LayerEntry:
    return LayerEntry(
        format="affine", scheme=scheme, shape=shape, method="random", activation=activation
    )


def random_affine(
    shape: Shape2D, scheme: WeightScheme, generator: torch.Generator
) -> QuantizedTensor:
    """Return an affine weight of random codes, grouped along in_features."""
    groups, device, top = scheme.num_groups(shape), generator.device, 2**scheme.num_bits
    size = scheme.group_size or shape.in_features
    codes = torch.randint(
        top,
        (shape.out_features, groups, size),
        dtype=torch.uint8,
        device=device,
        generator=generator,
    )
    numbers = torch.rand((shape.out_features, groups), device=device, generator=generator)
    scales = (numbers + 0.5) * 4 / (top * shape.in_features**0.5)
    zeros = torch.full(numbers.shape, top // 2 - 1, dtype=torch.uint8, device=device)
    return encode_affine(codes, scales.half(), zeros, scheme, shape)


@torch.no_grad()
def time_quantized_inputs(case: InputCase, rig: Rig) -> InputTimes:
    """Time a linear and float16 at each number of tokens, over weights that L2 doesn't hold."""
    entry, shape = case.entry, case.entry.shape
    assert entry.activation is not None
    ours = rotation(_modules(entry, rig))
    dense = random_dense(shape, DTYPE, generator_on(rig.device))
    theirs = rotation([dense.clone() for _ in range(copies_needed(dense.nbytes, rig.l2_bytes))])
    points = []
    for tokens in MANY_TOKENS:
        x = inputs(tokens, shape.in_features, DTYPE, rig.device)
        seconds = time_calls([partial(module, x) for module in ours], rig.timer)
        fp16 = time_calls(
            [partial(torch.nn.functional.linear, x, weight) for weight in theirs], rig.timer
        )
        kernel = ours[0].product_of(tokens)
        points.append(SweepPoint(tokens, kernel, seconds * 1e6, fp16 * 1e6, fp16 / seconds))
    return InputTimes(
        name=case.name,
        out_features=shape.out_features,
        in_features=shape.in_features,
        num_bits=entry.scheme.num_bits,
        group_size=entry.scheme.group_size,
        input_bits=entry.activation.num_bits,
        granularity=entry.activation.granularity,
        points=tuple(points),
    )


def _modules(entry: LayerEntry, rig: Rig) -> list[QuantizedLinear]:
    """Return as many copies of one linear as a cold cache takes."""
    tensor = random_affine(entry.shape, entry.scheme, generator_on(rig.device))
    first = QuantizedLinear(entry, None).to(rig.device)
    for part, values in tensor.parts.items():
        first.get_buffer(part).copy_(values)
    count = copies_needed(entry.num_bytes(), rig.l2_bytes)
    return [first, *(copy.deepcopy(first) for _ in range(count - 1))]
