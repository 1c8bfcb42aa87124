"""Write a checkpoint that is another one with other values: what was learned, or merged."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

import qtool
from qtool.base import Emit, Progress, QuantizedTensor
from qtool.checkpoint.manifest import LayerEntry
from qtool.checkpoint.marks import CONFIG_NAME, REPORT_NAME
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.spool import Made
from qtool.checkpoint.writer import CheckpointWriter
from qtool.modeling.companions import read_companions
from qtool.pipeline.model_figures import versions
from qtool.storage.plain_json import json_text


def rewrite(
    reader: CheckpointReader,
    writer: CheckpointWriter,
    make: Callable[[str, QuantizedTensor | Tensor], QuantizedTensor | Tensor],
    about: Mapping[str, Any],
    emit: Emit,
    what: str,
) -> None:
    """Write what `make` makes of each layer and tensor, with the manifest that belongs to it.

    Args:
        reader: The checkpoint that it comes of.
        writer: Takes the result.
        make: (name, what is stored) -> what is to be; of layers by their name, in any format.
        about: Goes into the report.
        emit: Is told of each.
        what: Is said to be going on.
    """
    manifest, entries = reader.manifest, dict[str, LayerEntry]()
    names = list(reader.names())
    for number, name in enumerate(names, 1):
        emit(Progress(what, number - 1, len(names), name))
        entry = manifest.layers.get(name)
        if entry is not None and entry.shared_with is not None:
            entries[name] = entry
            continue
        made = make(name, reader.load(name))
        writer.once(name, partial(Made, made))
        if entry is not None and isinstance(made, QuantizedTensor):
            entries[name] = replace(entry, format=made.format, scheme=made.scheme)
    new = replace(
        manifest, layers=entries, digests=writer.digests(), tool_version=qtool.__version__
    )
    files = read_companions(reader.directory)
    report = {
        "version of qtool": qtool.__version__,
        "run": writer.run_digest,
        "files": sorted({*files, REPORT_NAME, CONFIG_NAME}),
        **about,
        "average_bits": new.average_bits(),
        "versions": versions(),
        "layers": [],
    }
    files[REPORT_NAME] = (json_text(report) + "\n").encode()
    writer.finish(files, {**reader.plain_config(), "quantization_config": new.to_config()})
