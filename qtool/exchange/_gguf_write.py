"""A GGUF file, written one tensor at a time by the package `gguf`, and read back by it."""

import importlib.metadata
from pathlib import Path
from typing import Any

import torch

from qtool.base import Progress
from qtool.errors import CheckpointError, require
from qtool.exchange import Compared, Departure
from qtool.exchange._compare import check_equal
from qtool.exchange._directory import COMPARING_FILES, WRITING_FILES
from qtool.exchange._gguf_file import open_gguf
from qtool.exchange._gguf_names import ROPE_FACTORS
from qtool.exchange._gguf_plan import GgufPlan, content_of, meant_values, plan_file
from qtool.storage.whole_files import sync

GGUF_LIBRARY = "gguf"
COMPARED_AT_ONCE = 2**24
"""Weights."""


def write_gguf(departure: Departure, path: Path) -> None:
    """Write a file.

    Raises:
        MissingExtraError: the library that writes GGUF isn't installed.
        OSError: it can't be written; only the caller knows its name in the end.
    """
    require("Writing GGUF", "export", GGUF_LIBRARY)
    import gguf

    plan = plan_file(departure)
    writer = gguf.GGUFWriter(path, plan.architecture)
    try:
        _write_header(writer, plan)
        for number, each in enumerate(plan.tensors, start=1):
            writer.write_tensor_data(content_of(departure, each).numpy())
            departure.emit(Progress(WRITING_FILES, number, len(plan.tensors), each.name))
        if plan.factors is not None:
            writer.write_tensor_data(plan.factors.view(torch.uint8).numpy())
    finally:
        writer.close()
    sync(path)


def _write_header(writer: Any, plan: GgufPlan) -> None:  # noqa: ANN401 - gguf has no types
    for key, value in plan.metadata.items():
        _add(writer, key, value)
    for each in plan.tensors:
        _announce(writer, each.name, (*each.shape[:-1], each.row_bytes), each.type.name)
    if plan.factors is not None:
        _announce(writer, ROPE_FACTORS, (plan.factors.nbytes,), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _add(writer: Any, key: str, value: Any) -> None:  # noqa: ANN401
    """Add a value as llama.cpp expects its type: whole numbers uint32, others float32."""
    kinds = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    kinds[type(value)](key, value)


def _announce(writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:  # noqa: ANN401
    """Add a tensor to the header, by its shape in bytes."""
    import gguf
    import numpy as np

    size, number = 1, gguf.GGMLQuantizationType[kind]
    for length in shape:
        size *= length
    writer.add_tensor_info(name, shape, np.dtype(np.uint8), size, raw_dtype=number)


def compare_gguf(departure: Departure, path: Path) -> Compared:
    """Compare what the package `gguf` dequantizes with what our codes mean.

    Raises:
        CheckpointError: a tensor isn't there, or differs.
    """
    import gguf

    file, plan = open_gguf(path), plan_file(departure)
    names = {each.name for each in plan.tensors} | ({ROPE_FACTORS} & file.tensors.keys())
    if names != file.tensors.keys():
        raise CheckpointError(f"{path} has other tensors than were written. Export it again.")
    layers = 0
    for number, each in enumerate(plan.tensors, start=1):
        expected, kind = meant_values(departure, each), gguf.GGMLQuantizationType[each.type.name]
        at_once = max(1, COMPARED_AT_ONCE // each.shape[-1])
        for first, part in enumerate(expected.split(at_once)):
            rows = file.rows(each.name, first * at_once, len(part)) if part.ndim > 1 else None
            found = file.rows(each.name)[0] if rows is None else rows
            values = torch.from_numpy(gguf.quants.dequantize(found.numpy(), kind))
            check_equal(path, each.name, values, part)
        layers += each.source in departure.checkpoint.manifest.layers
        departure.emit(Progress(COMPARING_FILES, number, len(plan.tensors), each.name))
    tied = sum(1 for one in departure.checkpoint.manifest.layers.values() if one.shared_with)
    version = importlib.metadata.version(GGUF_LIBRARY)
    return Compared(
        layers=layers + tied,
        tensors=len(plan.tensors) - layers,
        by=f"{GGUF_LIBRARY} {version}",
    )
