"""One layer's kernels side by side, and the batch up to which ours is the fastest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from qtool.checkpoint.manifest import num_bytes
from qtool.formats import binary_coding
from qtool.runtime.backends.cuda import linear_kernels
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.launch import Card, Launch
from qtool.runtime.backends.cuda.mixed import MixedWeight, kernels_for, multiply_mixed
from qtool.scheme import Shape2D
from qtool.timing.peer_runs import PeerRun, PeerTime
from qtool.timing.synthetic import DTYPE, generator_on, random_dense
from qtool.timing.timing import Timer, clones, rotation, time_calls

BATCHES = (1, 2, 4, 8, 16, 32, 64)
OURS, CUBLAS = "qtool", "fp16 cuBLAS"
ACTIVATION_BYTES = 2


Timeable = KernelWeight | MixedWeight
"""What the kernels multiply by."""


@dataclass(frozen=True, slots=True)
class Rig:
    """What layers are timed on and with."""

    device: torch.device
    timer: Timer
    launch: Launch
    card: Card
    l2_bytes: int
    copy_bandwidth: float
    """Bytes per second, read and written."""
    kernel: str | None = None
    """One of `selection.KERNELS`; None: the one that `linear_kernels.kernel_for` chooses."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Layers of one shape and scheme, to be timed once."""

    name: str
    count: int
    """How many of them the model has."""
    load: Callable[[], Timeable]


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One kernel on one layer at one token."""

    what: str
    kernel: str
    """Which of qtool's kernels ran; empty for others."""
    microseconds: float
    weight_bytes: int
    """Packed weights, scales and offsets or zero points."""
    gb_per_second: float
    """Of weight bytes alone."""
    gb_per_second_with_activations: float
    of_copy_bandwidth: float
    """gb_per_second as a share of the copy in the same run."""
    speedup: float
    """Over float16 cuBLAS in the same run."""


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """Ours and float16 cuBLAS at one batch size."""

    tokens: int
    kernel: str
    microseconds: float
    fp16_microseconds: float
    speedup: float


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """All that was timed of one layer."""

    name: str
    out_features: int
    in_features: int
    num_bits: int
    group_size: int | None
    group_dim: str
    count: int
    rows: tuple[KernelRow, ...]
    sweep: tuple[SweepPoint, ...]
    break_even: int | None
    """First batch size of the sweep at which float16 is faster; None: at none of them."""
    failed: dict[str, str]
    """Peers that didn't run this layer, and why."""
    row_bits: tuple[int, ...] = ()
    """Widths of the rows, descending, where they have bits of their own."""
    peers: Mapping[str, Sequence[PeerTime]] = field(default_factory=dict)
    """Other libraries at the batch sizes of the sweep, by name."""


def kernel_row(  # noqa: PLR0913 - what was measured, and what it is compared with
    what: str,
    kernel: str,
    seconds: float,
    weight_bytes: int,
    shape: Shape2D,
    *,
    copy_bandwidth: float,
    fp16_seconds: float,
) -> KernelRow:
    """Return what follows from a time at one token."""
    activations = ACTIVATION_BYTES * (shape.in_features + shape.out_features)
    return KernelRow(
        what=what,
        kernel=kernel,
        microseconds=seconds * 1e6,
        weight_bytes=weight_bytes,
        gb_per_second=weight_bytes / seconds / 1e9,
        gb_per_second_with_activations=(weight_bytes + activations) / seconds / 1e9,
        of_copy_bandwidth=weight_bytes / seconds / copy_bandwidth,
        speedup=fp16_seconds / seconds,
    )


def break_even(sweep: Sequence[SweepPoint]) -> int | None:
    """Return the first batch size at which float16 is faster; None: at none."""
    return next((point.tokens for point in sweep if point.speedup < 1), None)


def stored_bytes(weight: Timeable) -> int:
    """Return the size of planes, scales and offsets as format `binary_coding` stores them."""
    if isinstance(weight, MixedWeight):
        return sum(map(stored_bytes, weight.classes))
    return sum(map(num_bytes, binary_coding.CODEC.layout(weight.scheme, weight.shape).values()))


def time_layer(layer: Layer, rig: Rig) -> LayerTimes:
    """Time a layer at every batch size, ours and float16."""
    weight = layer.load()
    shape, scheme = weight.shape, weight.scheme
    dense = random_dense(shape, DTYPE, generator_on(rig.device))
    sweep = _sweep(weight, dense, rig)
    fp16_seconds = sweep[0].fp16_microseconds / 1e6
    measured = [
        (OURS, sweep[0].kernel, sweep[0].microseconds / 1e6, stored_bytes(weight)),
        (CUBLAS, "", fp16_seconds, dense.nbytes),
    ]
    rows = tuple(
        kernel_row(*values, shape, copy_bandwidth=rig.copy_bandwidth, fp16_seconds=fp16_seconds)
        for values in measured
    )
    return LayerTimes(
        name=layer.name,
        out_features=shape.out_features,
        in_features=shape.in_features,
        num_bits=scheme.num_bits,
        group_size=scheme.group_size,
        group_dim=scheme.group_dim,
        count=layer.count,
        rows=rows,
        sweep=sweep,
        break_even=break_even(sweep),
        failed={},
        row_bits=tuple(num_bits for num_bits, _ in scheme.rows),
    )


def _sweep(weight: Timeable, dense: Tensor, rig: Rig) -> tuple[SweepPoint, ...]:
    """Time ours and float16 at every batch size, on the same copies."""
    ours = rotation(clones(weight, stored_bytes(weight), rig.l2_bytes))
    theirs = rotation(clones(dense, dense.nbytes, rig.l2_bytes))
    product = multiply_mixed if isinstance(weight, MixedWeight) else linear_kernels.matmul
    matmul = partial(product, launch=rig.launch, card=rig.card, kernel=rig.kernel)
    points = []
    for tokens in BATCHES:
        x = inputs(tokens, weight.shape.in_features, weight.dtype, rig.device)
        our_calls = [partial(matmul, x, copy) for copy in ours]
        half = x.to(DTYPE)
        their_calls = [partial(torch.nn.functional.linear, half, copy) for copy in theirs]
        seconds, fp16 = time_calls(our_calls, rig.timer), time_calls(their_calls, rig.timer)
        name = rig.kernel or kernels_for(weight, tokens, rig.card)
        points.append(SweepPoint(tokens, name, seconds * 1e6, fp16 * 1e6, fp16 / seconds))
    return tuple(points)


def inputs(tokens: int, in_features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return unit normal activations; zeros would draw less power and run at a higher clock."""
    generator = generator_on(device)
    return torch.randn(tokens, in_features, dtype=dtype, device=device, generator=generator)


def with_peer(layer: LayerTimes, name: str, run: PeerRun, copy_bandwidth: float) -> LayerTimes:
    """Return a layer's times with those of a peer, and what it failed at."""
    shape = Shape2D(layer.out_features, layer.in_features)
    times = tuple(run.times.get(shape, ()))
    fp16_seconds = layer.sweep[0].fp16_microseconds / 1e6
    rows = [
        kernel_row(
            *(name, "", one.microseconds / 1e6, one.weight_bytes, shape),
            copy_bandwidth=copy_bandwidth,
            fp16_seconds=fp16_seconds,
        )
        for one in times
        if one.tokens == layer.sweep[0].tokens
    ]
    failed = {name: run.failed[shape]} if shape in run.failed else {}
    peers = {name: times} if times else {}
    return replace(
        layer,
        rows=(*layer.rows, *rows),
        failed={**layer.failed, **failed},
        peers={**layer.peers, **peers},
    )
