"""The tables of `qtool bench` on a CPU: threads, parts of a step, and what ran beside."""

from typing import TYPE_CHECKING

from qtool.cli import console
from qtool.wording import gigabytes

if TYPE_CHECKING:
    from qtool.timing.cpu import CpuResult, CpuSpans


def print_cpu_result(result: "CpuResult") -> None:
    """Print one row per model and number of threads, then where the time of a token goes."""
    columns = ("model", "by", ">threads", ">prefill tokens/s", ">decode tokens/s")
    rows, before = [], ""
    for speed in result.speeds:
        key = f"{speed.name}, {speed.by}"
        labels = ("", "") if key == before else (speed.name, speed.by)
        numbers = (
            str(speed.threads),
            f"{speed.prefill_tokens_per_second:.1f}",
            f"{speed.decode_tokens_per_second:.1f}",
            gigabytes(speed.weight_bytes),
            f"{100 * speed.bandwidth_share:.0f} %",
        )
        rows.append((*labels, *numbers))
        before = key
    console.print_table("On the CPU", (*columns, ">per token", ">of reading"), rows)
    if result.spans is not None:
        _print_spans(result.spans, result.processor.cores)
    console.print_lines(f"Not timed: {name}: {why}" for name, why in result.not_run.items())
    console.print_lines(_conditions(result))


def _print_spans(spans: "CpuSpans", threads: int) -> None:
    rows = []
    for span in spans.spans:
        size = gigabytes(span.weight_bytes) if span.weight_bytes else ""
        rate = span.weight_bytes / span.microseconds / 1e3 if span.microseconds else 0.0
        share = "" if span.bandwidth_share is None else f"{100 * span.bandwidth_share:.0f} %"
        row = (span.name, f"{span.microseconds:.0f}", size, f"{rate:.1f}" if size else "", share)
        rows.append(row)
    title = f"One token by {threads} threads, all blocks together"
    console.print_table(title, ("part", ">us", ">weights", ">GB/s", ">of reading"), rows)
    console.print_lines([f"Outside of the step, in Python: {100 * spans.outside_share:.1f} %."])


def _conditions(result: "CpuResult") -> list[str]:
    processor, protocol = result.processor, result.protocol
    reads = ", ".join(
        f"{rate / 1e9:.1f} GB/s by {count}" for count, rate in processor.read_bandwidth.items()
    )
    return [
        f"{processor.name}, {processor.cores} cores, {processor.isa}; reads {reads}.",
        f"Batch 1: a prompt of {protocol.prompt_tokens}; {protocol.decode_tokens} tokens decoded "
        f"after {protocol.context_tokens}; median of {protocol.repeats}.",
    ]
