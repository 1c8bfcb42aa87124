"""The section on speed: the roofline of the kernels, and tokens per second."""

from collections.abc import Iterator, Mapping, Sequence

from qtool.report.lengths import Axes
from qtool.report.page.drawing import INK, logarithmic, style_of
from qtool.report.page.evidence import Evidence, Facts
from qtool.report.page.parts import Absent, PageSection, PageTable, Part, Picture, Words
from qtool.wording import gigabytes

_TITLE = "Speed and kernels"
RoofPoint = tuple[float, float]
"""Megabytes of a weight, GB/s."""


def speeds_section(evidence: Evidence) -> PageSection | Absent:
    """Return what kernels reach of the card, and how fast whole models are."""
    parts = [*_kernels(evidence.kernels), *_models(evidence)]
    if not parts:
        return Absent(
            _TITLE,
            "Nothing was timed: see `qtool bench OUT_DIR --gpu --json OUT_DIR/bench.json`, or a "
            "recipe with a section `bench`.",
        )
    return PageSection(_TITLE, tuple(parts))


def _kernels(found: Facts) -> Iterator[Part]:
    layers = found.get("layers") or ()
    if not layers:
        return
    card = found["machine"]["card"]
    yield Words(
        f"On {card}, torch {found['machine']['torch']}: a copy of 1 GiB moves "
        f"{found['copy_gb_per_second']:,.0f} GB/s. Kernels are timed at one token, on weights that "
        "the card's cache doesn't hold; GB/s count weights, scales and offsets."
    )
    yield _roofline(layers, found["copy_gb_per_second"])
    rows = tuple(cells for layer in layers for cells in _layer(layer))
    columns = (
        "layer and kernel",
        ">out x in",
        ">count",
        ">us",
        ">GB/s",
        ">of a copy",
        ">times fp16",
    )
    yield PageTable("Kernels at one token", columns, rows)
    reasons = tuple((name, why) for name, why in (found.get("not_run") or {}).items())
    if reasons:
        yield PageTable("What wasn't timed", ("what", "why"), reasons)


def _layer(layer: Facts) -> Iterator[tuple[str, ...]]:
    for row in layer["rows"]:
        yield (
            f"{layer['name']}: {row['what']} {row['kernel']}".strip(),
            f"{layer['out_features']} x {layer['in_features']}",
            str(layer["count"]),
            f"{row['microseconds']:.1f}",
            f"{row['gb_per_second']:,.0f}",
            f"{row['of_copy_bandwidth']:.0%}",
            f"{row['speedup']:.2f}",
        )


def _roofline(layers: Sequence[Facts], roof: float) -> Picture:
    series: dict[str, list[RoofPoint]] = {}
    for layer in layers:
        for row in layer["rows"]:
            label = f"{row['what']} {row['kernel']}".strip()
            at = (row["weight_bytes"] / 1e6, row["gb_per_second"])
            series.setdefault(label, []).append(at)

    def paint(axes: Axes) -> None:
        axes.axhline(roof, color=INK, linestyle="--", linewidth=1, label=f"copy: {roof:,.0f} GB/s")
        for number, (label, points) in enumerate(series.items()):
            look = {**style_of(number), "linestyle": "", "markersize": 6}
            axes.plot(*zip(*points, strict=True), label=label, **look)
        logarithmic(axes, "x")
        axes.set_ylim(0, 1.08 * max(roof, *(y for points in series.values() for _, y in points)))
        axes.set_xlabel("weights, scales and offsets of a layer, MB")
        axes.set_ylabel("bandwidth at one token, GB/s")

    return Picture("Roofline of the kernels", _said(series, roof), paint)


def _said(series: Mapping[str, Sequence[RoofPoint]], roof: float) -> str:
    parts = [
        f"{label}: {min(y for _, y in points) / roof:.0%} to {max(y for _, y in points) / roof:.0%}"
        for label, points in series.items()
    ]
    return f"Of the copy bandwidth, {'; '.join(parts)}."


def _models(evidence: Evidence) -> Iterator[Part]:
    whole = evidence.kernels.get("end_to_end") or ()
    timed = [
        (one["name"], one["speed"], ", ".join(one["speed"]["backends"]) or "torch")
        for one in evidence.speeds.get("figures") or ()
        if one.get("speed")
    ]
    for found, memory in ((timed, False), ([(one["name"], one, "") for one in whole], True)):
        if not found:
            continue
        rows = tuple(
            (
                name,
                f"{speed['prefill_tokens_per_second']:,.1f}",
                f"{speed['decode_tokens_per_second']:,.1f}",
                gigabytes(speed["peak_memory_bytes"]) if memory else backend,
            )
            for name, speed, backend in found
        )
        about = found[0][1]
        caption = (
            f"Tokens per second at batch 1: prompt of {about['prompt_tokens']}, "
            f"{about['decode_tokens']} decoded, median of {about['repeats']}"
        )
        last = ">peak memory" if memory else "backend"
        columns = ("model", ">prefill, tokens/s", ">decode, tokens/s", last)
        yield PageTable(caption, columns, rows)
