"""`qtool inspect`, `qtool methods`, `qtool recipes`: what is there."""

from collections import Counter
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated

import typer

from qtool.base import Progress
from qtool.cli import console
from qtool.cli.options import JsonOption
from qtool.cli.progress import progress
from qtool.wording import gigabytes


def inspect(
    out_dir: Annotated[Path, typer.Argument(help="Checkpoint.")],
    layers: Annotated[bool, typer.Option("--layers", help="List every layer.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all tensors and compare their digests.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Check a checkpoint and print what it holds."""
    with progress() as emit:
        emit(Progress(f"opening {out_dir}"))
        from qtool.checkpoint.reader import CheckpointReader  # torch: slow

        reader = CheckpointReader(out_dir)
    manifest = reader.manifest
    verified = reader.verify() if verify else None
    figures = {"average_bits": manifest.average_bits(), "verified_tensors": verified}
    console.write_json({**manifest.to_config(), **figures}, json_file)
    if not console.wants_table(json_file):
        return
    kinds = Counter(
        f"{e.format} {e.scheme.num_bits} bit, group {e.scheme.group_size or 'row'}"
        f" along {e.scheme.group_dim}, by {e.method}"
        for e in manifest.layers.values()
    )
    rows = [(kind, str(count)) for kind, count in kinds.most_common()]
    rows.append(("bits per weight, with scales", console.compact(manifest.average_bits())))
    rows.append(("size of the weights", gigabytes(reader.weight_bytes())))
    rows.append(("written by", f"qtool {manifest.tool_version}, format {manifest.format_version}"))
    rows.append(("source", manifest.source or "a local model"))
    if verified is not None:
        rows.append(("verified", f"{verified} tensors are as they were written"))
    console.print_table(str(out_dir), {"": "left", "value": "left"}, rows)
    if layers:
        columns = {"layer": "left", "shape": "right", "format": "left", "bits": "right"}
        columns |= {"size": "right"}
        console.print_table(
            "Layers",
            columns,
            [
                (
                    name,
                    "x".join(map(str, entry.shape)),
                    entry.format,
                    str(entry.scheme.num_bits),
                    f"as {entry.shared_with}"
                    if entry.shared_with
                    else gigabytes(entry.num_bytes()),
                )
                for name, entry in manifest.layers.items()
            ],
        )


def methods(json_file: JsonOption = None) -> None:
    """List the methods and their options."""
    import qtool.methods
    from qtool import plugins

    with progress() as emit:
        emit(Progress("opening the methods"))
        from qtool.stages.plan import load_method  # torch: slow

        known = {name: load_method(name) for name in plugins.names(qtool.methods)}
    console.write_json(
        {
            name: {
                "summary": method.summary,
                "num_bits": [method.num_bits.start, method.num_bits.stop - 1],
                "needs": sorted(method.needs),
                "uses": sorted(method.uses),
                "options": {option.name: option.default for option in fields(method.options)},
            }
            for name, method in known.items()
        },
        json_file,
    )
    for name, method in known.items() if console.wants_table(json_file) else ():
        bits = f"{method.num_bits.start} to {method.num_bits.stop - 1} bits"
        needs = ", ".join(sorted(method.needs)) or "no data"
        console.print_table(
            f"{name}: {method.summary} {bits}; needs {needs}.",
            {"option": "left", "default": "left"},
            [
                (option.name, "required" if option.default is MISSING else repr(option.default))
                for option in fields(method.options)
            ],
        )


def recipes(json_file: JsonOption = None) -> None:
    """List the built-in recipes."""
    from qtool.recipe.load import load_recipe
    from qtool.recipe.names import built_in

    loaded = {name: load_recipe(name) for name in built_in()}
    dumped = {name: recipe.model_dump(mode="json") for name, recipe in loaded.items()}
    console.write_json(dumped, json_file)
    if console.wants_table(json_file):
        rows = [(name, recipe.description) for name, recipe in loaded.items()]
        console.print_table("Built-in recipes", {"recipe": "left", "what it does": "left"}, rows)
