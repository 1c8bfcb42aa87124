"""`qtool inspect`, `qtool methods`, `qtool recipes`: what is there."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtool import plugins
from qtool.base import Method, Progress
from qtool.cli import console
from qtool.cli.options import JsonOption, check_targets, wrong_plot_name
from qtool.cli.progress import progress
from qtool.cli.tables.kept import print_kept
from qtool.wording import gigabytes

if TYPE_CHECKING:
    from qtool.checkpoint.manifest import LayerEntry, Manifest
    from qtool.checkpoint.reader import CheckpointReader
    from qtool.checkpoint.sizes import DiskSizes
    from qtool.folds import Fold
    from qtool.runtime.card_memory import CardMemory


def inspect(
    out_dir: Annotated[Path, typer.Argument(help="Checkpoint.")],
    layers: Annotated[bool, typer.Option("--layers", help="List every layer.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all tensors and compare their digests.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw what tuning gained: .png or .svg.")
    ] = None,
    plot_search: Annotated[
        Path | None, typer.Option(help="Draw what a search tried: .png or .svg.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Check a checkpoint and print what it holds.

    [bold]Examples[/bold]

      qtool inspect OUT_DIR

      qtool inspect OUT_DIR --layers --verify
    """
    if wrong := [*wrong_plot_name(plot), *wrong_plot_name(plot_search)]:
        raise typer.BadParameter(wrong[0])
    check_targets([json_file, plot, plot_search])
    with progress() as emit:
        emit(Progress(f"opening {out_dir}"))
        from qtool.checkpoint.marks import read_report
        from qtool.checkpoint.reader import CheckpointReader  # torch: slow
        from qtool.checkpoint.sizes import sizes_of
        from qtool.pipeline.inspect import memory_of
        from qtool.report.roofline import check_plot

        for file in filter(None, (plot, plot_search)):
            check_plot(file)
        reader = CheckpointReader(out_dir)
        sizes, memory = sizes_of(reader), memory_of(reader)
        check = read_report(out_dir).get("check")
        verified = reader.verify(emit) if verify else None
        _draw(out_dir, plot, plot_search)
    manifest = reader.manifest
    figures = {
        "average_bits": manifest.average_bits(),
        "strict_bits": sizes.strict_bits,
        "sizes": [asdict(each) for each in sizes.kinds],
        "header_bytes": sizes.header_bytes,
        "verified_tensors": verified,
        "on_a_card": memory and asdict(memory),
        **({"check": check} if check else {}),
    }
    if not console.write_json({**manifest.to_config(), **figures}, json_file):
        return
    rows: list[tuple[str, ...]] = _summary(manifest, sizes, memory)
    if verified is not None:
        rows.append(("verified", f"{verified} tensors are as they were written"))
    if check:
        rows.append(("check after writing", _verdict(check)))
    console.print_table(str(out_dir), ("", "value"), rows)
    _print_bytes(sizes)
    _print_kept(reader)
    _print_classes(manifest.layers)
    if layers:
        columns = ("layer", ">shape", "format", ">bits", ">size")
        rows = [(name, *_cells(entry)) for name, entry in manifest.layers.items()]
        console.print_table("Layers", columns, rows)


def _summary(
    manifest: "Manifest", sizes: "DiskSizes", memory: "CardMemory | None"
) -> list[tuple[str, ...]]:
    """Return the rows of the first table that each checkpoint has."""
    kinds = Counter(
        f"{e.format} {_bits(e)} bit, group {e.scheme.group_size or 'row'}"
        f" along {e.scheme.group_dim}, by {e.method}{_inputs(e)}"
        for e in manifest.layers.values()
    )
    strict = sizes.strict_bits
    rows: list[tuple[str, ...]] = [
        *((kind, str(count)) for kind, count in kinds.most_common()),
        ("bits per weight, with scales", f"{manifest.average_bits():.2f}"),
        ("bits per weight of the whole model, strict", f"{strict:.2f}"),
        ("smaller than float16, float32", f"{16 / strict:.1f}, {32 / strict:.1f} times"),
        ("size of the weights", gigabytes(sizes.num_bytes)),
    ]
    if memory is not None:
        rows.append(("weights on a card, by backend cuda", gigabytes(memory.weight_bytes)))
        if memory.cache_bytes_per_token is not None:
            cache = 1000 * memory.cache_bytes_per_token
            rows.append(("keys and values there, per 1,000 tokens", gigabytes(cache)))
    rows.append(("written by", f"qtool {manifest.tool_version}, format {manifest.format_version}"))
    rows.append(("source", manifest.source or "a local model"))
    return rows


def _print_kept(reader: "CheckpointReader") -> None:
    stored = {*reader.names()}  # a manifest may have been changed by hand
    kept = {name: why for name, why in reader.manifest.unquantized.items() if name in stored}
    print_kept(kept, lambda name: "x".join(map(str, reader.spec(name).shape)))


def _verdict(check: Mapping[str, Any]) -> str:
    """Return what became of the budgets of the recipe that made it."""
    return "passed" if check.get("passed") else f"FAILED: {'; '.join(check.get('failed', ()))}"


def _print_bytes(sizes: "DiskSizes") -> None:
    rows = [
        (each.kind, f"{each.num_weights:,}", f"{each.num_bytes:,}", f"{each.bits:.2f}")
        for each in sizes.kinds
    ]
    rows.append(("headers of the files", "", f"{sizes.header_bytes:,}", ""))
    rows.append(
        ("all", f"{sizes.num_weights:,}", f"{sizes.num_bytes:,}", f"{sizes.strict_bits:.2f}")
    )
    console.print_table("Bytes on disk", ("", ">weights", ">bytes", ">bits"), rows)


def _print_classes(entries: Mapping[str, "LayerEntry"]) -> None:
    """Print a table per layer whose rows have bits of their own, that adds up to its bytes."""
    from qtool.checkpoint.sizes import class_sizes

    columns = ("rows of", ">rows", ">weights", ">bytes", ">bits")
    for name, entry in entries.items():
        classes = () if entry.shared_with else class_sizes(entry)
        rows = [
            (f"{c.num_bits} bits", *(f"{n:,}" for n in (c.num_rows, c.num_weights, c.num_bytes)))
            for c in classes
        ]
        rows = [(*row, f"{c.bits:.2f}") for row, c in zip(rows, classes, strict=True)]
        if rows:
            weights, size = prod(entry.shape), entry.num_bytes()
            numbers = size - sum(each.num_bytes for each in classes)
            rows.append(("which class a row is of", "", "", f"{numbers:,}", ""))
            total = f"{entry.shape.out_features:,}", f"{weights:,}", f"{size:,}"
            rows.append(("all", *total, f"{8 * size / weights:.2f}"))
            console.print_table(f"Rows of {name}", columns, rows)


def _bits(entry: "LayerEntry") -> str:
    return "/".join(map(str, entry.scheme.widths))


def _inputs(entry: "LayerEntry") -> str:
    """Return what is said of inputs that are quantized; nothing of others."""
    scheme = entry.activation
    return "" if scheme is None else f", inputs {scheme.num_bits} bit per {scheme.granularity}"


def _draw(out_dir: Path, curves: Path | None, trials: Path | None) -> None:
    """Draw what tuning gained and what a search tried, as far as it is asked for."""
    from qtool.pipeline.reports import CURVES_NAME, TRIALS_NAME
    from qtool.report.curves import draw_curves, read_curves
    from qtool.report.trials import draw_trials, read_trials

    if curves is not None:
        draw_curves(curves, read_curves(out_dir / CURVES_NAME))
    if trials is not None:
        draw_trials(trials, read_trials(out_dir / TRIALS_NAME))


def _cells(entry: "LayerEntry") -> tuple[str, ...]:
    size = f"as {entry.shared_with}" if entry.shared_with else gigabytes(entry.num_bytes())
    return "x".join(map(str, entry.shape)), entry.format, _bits(entry), size


def methods(json_file: JsonOption = None) -> None:
    """List the methods and their options."""
    import qtool.methods
    from qtool import folds

    with progress() as emit:
        emit(Progress("opening the methods"))
        from qtool.steps.plan import load_method  # torch: slow

        known = {name: load_method(name) for name in plugins.names(qtool.methods)}
        before = {name: folds.load_fold(name) for name in folds.fold_names()}
    described = {name: _described(method) for name, method in known.items()}
    if not console.write_json(described, json_file):
        return
    for name, about in described.items():
        low, high = about["num_bits"]
        needs = "needs" if about["needs"] else "takes" if about["uses"] else "ignores"
        title = f"{name}: {about['summary']} {low} to {high} bits; {needs} calibration data."
        _print_options(title, known[name])
    for name, fold in before.items():
        _print_options(f"fold {name}: {fold.summary}", fold)


def _print_options(title: str, plugin: "Method | Fold") -> None:
    meanings = plugins.attribute_docstrings(plugin.options)
    rows = [
        (option, "required" if default is MISSING else repr(default), meanings.get(option, ""))
        for option, default in _defaults(plugin).items()
    ]
    console.print_table(title, ("option", "default", "meaning"), rows)


def _defaults(plugin: "Method | Fold") -> dict[str, Any]:
    return {option.name: option.default for option in fields(plugin.options)}


def _described(method: Method) -> dict[str, Any]:
    return {
        "summary": method.summary,
        "num_bits": [method.num_bits.start, method.num_bits.stop - 1],
        "needs": sorted(method.needs),
        "uses": sorted(method.uses),
        "options": _defaults(method),
    }


def recipes(json_file: JsonOption = None) -> None:
    """List the built-in recipes."""
    from qtool.recipe.load import load_recipe
    from qtool.recipe.names import built_in, in_folders

    names = (*built_in(), *in_folders())
    loaded = {name: load_recipe(name) for name in names}
    dumped = {name: recipe.model_dump(mode="json") for name, recipe in loaded.items()}
    if not console.write_json(dumped, json_file):
        return
    for title, known in (
        ("Built-in recipes, for `qtool quantize --recipe`", built_in()),
        ("Whole runs with gates, for `qtool run`", in_folders()),
    ):
        rows = [(name, loaded[name].description) for name in known]
        console.print_table(title, ("recipe", "what it does"), rows)
