"""`qtool bench --gpu`: kernels layer by layer, then whole models, all in one run on one card."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from qtool.base import Emit, Progress, ignore_events
from qtool.errors import QtoolError
from qtool.modeling.device import free_memory
from qtool.runtime.backends.cuda import driver
from qtool.runtime.backends.cuda.decode_ops import KernelOps
from qtool.runtime.decode.ops import DecodeOps
from qtool.scheme import Shape2D
from qtool.timing.decode import EndToEndResult, time_decoder
from qtool.timing.kernels import BATCHES, LayerTimes, Rig, time_layer, with_peer
from qtool.timing.machine import Clock, Machine, describe_card, l2_bytes
from qtool.timing.peer_runs import PeerRequest, every_peer, run_peer
from qtool.timing.quantized_inputs import InputTimes, time_quantized_inputs
from qtool.timing.several_cards import SeveralCards
from qtool.timing.timing import CudaTimer, copies, copy_bandwidth
from qtool.timing.workload import Workload


@dataclass(frozen=True, slots=True)
class Bench:
    """All that needs a card, in one place: tests put others in."""

    rig: Rig
    ops: DecodeOps
    clock: Clock
    machine: Callable[[], Machine]


@dataclass(frozen=True, slots=True)
class GpuResult:
    """What one run measured."""

    name: str
    machine: Machine
    copy_gb_per_second: float
    """Read and written bytes of a copy of 1 GiB."""
    layers: tuple[LayerTimes, ...]
    end_to_end: tuple[EndToEndResult, ...]
    not_run: dict[str, str]
    """Peers and models that weren't timed, and why."""
    versions: dict[str, str]
    quantized_inputs: tuple[InputTimes, ...] = ()
    """Linears whose inputs are quantized, where that was asked for."""
    several_cards: SeveralCards | None = None
    """The models on several cards, where that was asked for."""


def on_card(device: torch.device, kernel: str | None) -> Bench:
    """Return what times on a card; measures its copy bandwidth. `kernel`: of the `Rig`."""
    timer = CudaTimer(device)
    card = driver.card_of(device.index)
    bandwidth = copy_bandwidth(device, timer)
    rig = Rig(device, timer, driver.launch, card, l2_bytes(device), bandwidth, kernel)
    return Bench(
        rig=rig,
        ops=KernelOps(driver.launch, card),
        clock=Clock(device),
        machine=lambda: describe_card(device, copies(device)),
    )


@torch.no_grad()
def time_workload(
    workload: Workload,
    bench: Bench,
    versions: dict[str, str],
    *,
    with_peers: bool = False,
    emit: Emit = ignore_events,
) -> GpuResult:
    """Time all of a workload, and with peers also other libraries that are installed."""
    not_run: dict[str, str] = {}
    machine = bench.machine()
    layers: list[LayerTimes] = []
    end_to_end = []
    for layer in workload.layers:
        emit(Progress(f"time {layer.name}"))
        with _alone(layer.name, not_run):
            layers.append(time_layer(layer, bench.rig))
    layers = _beside_peers(layers, bench.rig, not_run, emit, asked=with_peers)
    quantized = tuple(_quantized_inputs(workload, bench, not_run, emit))
    if workload.no_models:
        not_run["end to end"] = workload.no_models
    for model in workload.models:
        emit(Progress(f"time {model.name}"))
        with _alone(model.name, not_run):
            end_to_end.append(time_decoder(model, bench.ops, bench.clock))
    return GpuResult(
        name=workload.name,
        machine=machine,
        copy_gb_per_second=bench.rig.copy_bandwidth / 1e9,
        layers=tuple(layers),
        end_to_end=tuple(end_to_end),
        not_run=not_run,
        versions=versions,
        quantized_inputs=quantized,
    )


def _beside_peers(
    layers: list[LayerTimes], rig: Rig, not_run: dict[str, str], emit: Emit, *, asked: bool
) -> list[LayerTimes]:
    """Return layers with the times of peers, each of which has the card for itself meanwhile."""
    shapes = dict.fromkeys(Shape2D(one.out_features, one.in_features) for one in layers)
    request = PeerRequest(tuple(shapes), BATCHES, rig.l2_bytes, rig.device)
    for module, peer in every_peer():
        if not (asked or peer.is_in_torch):
            continue
        reason = peer.why_not(rig.device)
        if reason is not None:
            not_run[peer.name] = reason
        elif layers:
            emit(Progress(f"time {peer.name}"))
            run = run_peer(module, peer.name, request)
            layers = [with_peer(one, peer.name, run, rig.copy_bandwidth) for one in layers]
    return layers


def _quantized_inputs(
    workload: Workload, bench: Bench, not_run: dict[str, str], emit: Emit
) -> Iterator[InputTimes]:
    for case in workload.quantized_inputs:
        scheme = case.entry.scheme
        name = f"{case.name}, {scheme.num_bits} bits, group {scheme.group_size or 'row'}"
        emit(Progress(f"time {name}, quantized inputs"))
        with _alone(name, not_run):
            yield time_quantized_inputs(case, bench.rig)


@contextlib.contextmanager
def _alone(name: str, not_run: dict[str, str]) -> Iterator[None]:
    """Say why something doesn't run, and return its memory, which the next one needs."""
    try:
        yield
    except (QtoolError, torch.OutOfMemoryError) as error:
        not_run[name] = " ".join(str(error).split())
    free_memory()
