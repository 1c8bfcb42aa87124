"""The tables of `qtool bench --gpu`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qtool.cli import console
from qtool.wording import gigabytes

if TYPE_CHECKING:
    from qtool.timing.decode import EndToEndResult
    from qtool.timing.gpu import GpuResult
    from qtool.timing.kernels import LayerTimes
    from qtool.timing.machine import Machine
    from qtool.timing.several_cards import SeveralCards


def print_gpu_result(result: "GpuResult") -> None:
    """Print kernels by layer, the batch sweep of those that weigh most, models."""
    if result.layers:
        _print_layers(result)
        _print_sweep(max(result.layers, key=lambda x: x.count * x.rows[0].weight_bytes))
    if result.quantized_inputs:
        _print_quantized_inputs(result)
    if result.end_to_end:
        _print_end_to_end("End to end at batch 1", result.end_to_end)
    several = result.several_cards
    if several is not None:
        _print_end_to_end(f"End to end on {several.cards} cards at batch 1", several.models)
        _print_sums(several)
        console.print_lines(f"Not timed: {name}: {why}" for name, why in several.not_run.items())
    console.print_lines(f"Not timed: {name}: {why}" for name, why in result.not_run.items())
    for layer in result.layers:
        where = f"Not timed on {layer.name}"
        console.print_lines(f"{where}: {name}: {why}" for name, why in layer.failed.items())
    console.print_lines(_conditions(result))


def gpu_report(result: "GpuResult") -> dict[str, Any]:
    """Return the JSON form; without what wasn't asked for."""
    report = asdict(result)
    for name in ("quantized_inputs", "several_cards"):
        if not report[name]:
            del report[name]
    return report


def _print_quantized_inputs(result: "GpuResult") -> None:
    columns = ("layer", "out x in", "weights", "inputs", ">tokens", "by", ">us", ">x fp16")
    rows = []
    for layer in result.quantized_inputs:
        size = "row" if layer.group_size is None else f"g{layer.group_size}"
        kinds = f"{layer.num_bits} bit {size}", f"{layer.input_bits} bit per {layer.granularity}"
        labels = (layer.name, f"{layer.out_features} x {layer.in_features}", *kinds)
        for point in layer.points:
            speed = f"{point.microseconds:.1f}", f"{point.speedup:.2f}"
            rows.append((*labels, str(point.tokens), point.kernel, *speed))
            labels = ("", "", "", "")
    console.print_table("Linears whose inputs are quantized", columns, rows)


def _print_layers(result: "GpuResult") -> None:
    columns = ("layer", "out x in", ">count", "kernel", ">us", ">GB/s", ">of copy", ">x fp16")
    rows = []
    for layer in result.layers:
        labels = (layer.name, f"{layer.out_features} x {layer.in_features}", str(layer.count))
        for row in layer.rows:
            bits = "/".join(map(str, layer.row_bits or [layer.num_bits]))
            own = f"{row.what} {bits} bit {group(layer)}, {row.kernel}"
            speed = f"{row.microseconds:.1f}", f"{row.gb_per_second:,.0f}"
            shares = f"{row.of_copy_bandwidth:.0%}", f"{row.speedup:.2f}"
            rows.append((*labels, own if row.kernel else row.what, *speed, *shares))
            labels = ("", "", "")
    console.print_table(f"Kernels at one token: {result.name}", columns, rows)
    ours, theirs = (sum(x.count * x.rows[i].microseconds for x in result.layers) for i in (0, 1))
    console.out.print(
        f"All of these, by count: {ours / 1e3:.2f} ms per token, "
        f"fp16 {theirs / 1e3:.2f} ms ({theirs / ours:.2f}x)."
    )


def group(layer: "LayerTimes") -> str:
    """Return the grouping in few letters: g128; `out` where groups run along out_features."""
    size = "row" if layer.group_size is None else f"g{layer.group_size}"
    return size if layer.group_dim == "in_features" else f"{size} out"


def _print_sweep(layer: "LayerTimes") -> None:
    columns = (">tokens", "kernel", ">us", ">fp16 us", ">x fp16")
    rows = []
    for point in layer.sweep:
        times = f"{point.microseconds:.1f}", f"{point.fp16_microseconds:.1f}"
        rows.append((str(point.tokens), point.kernel, *times, f"{point.speedup:.2f}"))
    title = f"Batch sweep: {layer.name}, {layer.out_features} x {layer.in_features}"
    console.print_table(title, columns, rows)
    last = layer.sweep[-1].tokens
    at = f"none up to {last}" if layer.break_even is None else f"{layer.break_even} tokens"
    console.out.print(f"Break-even, the first batch at which fp16 is faster: {at}.")
    if layer.peers:
        _print_peers(layer)


def _print_peers(layer: "LayerTimes") -> None:
    """Print microseconds by batch size, ours, float16 and those of other libraries."""
    tokens = [point.tokens for point in layer.sweep]
    times = {
        "qtool": {point.tokens: point.microseconds for point in layer.sweep},
        "fp16 cuBLAS": {point.tokens: point.fp16_microseconds for point in layer.sweep},
    }
    for name, points in layer.peers.items():
        times[name] = {point.tokens: point.microseconds for point in points}
    rows = [
        (name, *(f"{found[count]:.1f}" if count in found else "" for count in tokens))
        for name, found in times.items()
    ]
    title = f"Microseconds by tokens: {layer.name}, {layer.out_features} x {layer.in_features}"
    console.print_table(title, ("kernel", *(f">{count}" for count in tokens)), rows)


def _print_end_to_end(title: str, models: "Sequence[EndToEndResult]") -> None:
    columns = (
        *("model", ">prefill tokens/s", ">decode tokens/s", ">peak memory"),
        *("key-value cache", ">bytes per token"),
    )
    rows = [
        (
            model.name,
            f"{model.prefill_tokens_per_second:,.0f}",
            f"{model.decode_tokens_per_second:.1f}",
            gigabytes(model.peak_memory_bytes),
            model.kv_cache,
            f"{model.kv_cache_bytes_per_token:,}",
        )
        for model in models
    ]
    console.print_table(title, columns, rows)


def _print_sums(several: "SeveralCards") -> None:
    columns = (">bytes", ">us", ">us by NCCL")
    rows = [
        (f"{one.num_bytes:,}", f"{one.microseconds:.1f}", f"{one.nccl_microseconds:.1f}")
        for one in several.sums
    ]
    console.print_table(f"Sums over cards, by {several.sums_by}", columns, rows)


def _conditions(result: "GpuResult") -> list[str]:
    """Return what the numbers hold for."""
    lines = [
        f"{card_line(result.machine)}. Copy of 1 GiB: {result.copy_gb_per_second:,.0f} GB/s.",
        "Kernels: graph replays over weights that L2 doesn't hold, median of 15; GB/s counts "
        "weights, scales and offsets.",
    ]
    if result.end_to_end:
        model = result.end_to_end[0]
        lines.append(
            f"End to end: prompt {model.prompt_tokens}, {model.decode_tokens} tokens decoded, "
            f"median of {model.repeats}."
        )
    return lines


def card_line(machine: "Machine") -> str:
    """Return what was measured on."""
    parts = [machine.card]
    if machine.sm_clock_mhz is not None:
        parts.append(f"SM {machine.sm_clock_mhz} of {machine.max_sm_clock_mhz} MHz")
    if machine.driver:
        parts.append(f"driver {machine.driver}")
    return ", ".join([*parts, f"torch {machine.torch}, CUDA {machine.cuda}"])
