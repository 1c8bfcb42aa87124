"""A calibration directory: written whole, replaced only if it is one, checked when it is read."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from qtool.base import Tokenizer
from qtool.checkpoint.place import nearest
from qtool.data.calibration import CalibrationSet, tokenizer_digest
from qtool.errors import DataError, OutputError
from qtool.storage.jsonl import check_file, json_value, read_text
from qtool.storage.plain_json import json_text
from qtool.storage.whole_files import written_whole
from qtool.wording import reason

SAMPLES_NAME = "samples.safetensors"
ABOUT_NAME = "calibration.json"
FILE_NAMES = (SAMPLES_NAME, ABOUT_NAME)
LENGTHS_NAME = "lengths.png"
"""A picture that `qtool calibrate` draws beside them."""
MOST_ABOUT_BYTES = 1 << 24
REDO = "Run `qtool calibrate` again."


def check_no_calibration(
    directory: Path, *, overwrite: bool = False, model_directory: Path | None = None
) -> None:
    """Refuse a directory that calibration data would spoil, before any are drawn.

    With `overwrite` calibration data that are there may be replaced, and nothing else.

    Raises:
        OutputError: there are some, or something else is in the way.
    """
    try:
        if os.path.lexists(directory) and not directory.is_dir():
            raise OutputError(f"{directory} is a file. Name a directory for the calibration data.")
        if model_directory is not None and os.path.realpath(directory) == os.path.realpath(
            model_directory
        ):
            raise OutputError(f"{directory} is the model's own directory. Name another one.")
        names = (*FILE_NAMES, LENGTHS_NAME)
        found = [name for name in names if os.path.lexists(directory / name)]
        folder = nearest(directory.absolute())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(
                f"Can't write {directory}: {folder} isn't a directory that can be written. Name "
                "another one."
            )
    except OSError as error:
        raise OutputError(f"Can't write {str(directory)!r}: {reason(error)}.") from error
    if not found:
        return
    if not _is_ours(directory):
        raise OutputError(
            f"{directory} has a file {found[0]} but no calibration data of qtool. Name another "
            "directory, or move the file away."
        )
    if not overwrite:
        raise OutputError(f"{directory} holds calibration data. Pass --overwrite to replace them.")


def _is_ours(directory: Path) -> bool:
    """Return whether a directory has what only `save_calibration` writes, maybe damaged since."""
    try:
        return {"digest", "tokenizer", "samples wanted"} <= _about(directory).keys()
    except DataError:
        return False


def save_calibration(calibration: CalibrationSet, directory: Path) -> None:
    """Write samples, and what decided them.

    All bytes are on disk before the first file gets its name: a full disk leaves what was there.
    `calibration.json` comes last, and has the digest of the samples. The directory is made; files
    of the same names are replaced.

    Raises:
        OutputError: the directory can't be written.
    """
    tensors = {
        "tokens": torch.cat(calibration.samples),
        "lengths": torch.tensor([len(sample) for sample in calibration.samples]),
    }
    if calibration.sources:
        tensors["sources"] = torch.tensor(calibration.sources)
    about = {**calibration.provenance, "digest": calibration.digest()}
    contents = {
        ABOUT_NAME: (json_text(about) + "\n").encode(),
        SAMPLES_NAME: save(tensors),
    }
    try:
        with contextlib.ExitStack() as stack:  # files get their names in reverse order
            for name, content in contents.items():
                opened = stack.enter_context(written_whole(directory / name, durable=True))
                opened.write(content)
                opened.flush()
                os.fsync(opened.fileno())
    except OSError as error:
        raise OutputError(f"Can't write {directory}: {reason(error)}.") from error


def load_calibration(directory: Path, tokenizer: Tokenizer) -> CalibrationSet:
    """Read what `save_calibration` wrote, and check all of it.

    Raises:
        DataError: files are missing or damaged, or the samples are another tokenizer's.
    """
    about = _about(directory)
    samples, sources = _samples(directory / SAMPLES_NAME)
    calibration = CalibrationSet(samples, about, sources)
    if about.get("digest") != calibration.digest():
        raise DataError(f"{directory}: samples and {ABOUT_NAME} don't belong together. {REDO}")
    if about.get("tokenizer") != tokenizer_digest(tokenizer):
        raise DataError(
            f"{directory} was made with another tokenizer. Run `qtool calibrate` on this model."
        )
    return calibration


def _about(directory: Path) -> Mapping[str, Any]:
    try:
        text = read_text(directory / ABOUT_NAME, most_bytes=MOST_ABOUT_BYTES)
        about = json_value(text, str(directory / ABOUT_NAME))
    except DataError as error:
        raise DataError(f"{directory} is no calibration directory: {error} {REDO}") from error
    if not isinstance(about, dict):
        raise DataError(f"{directory / ABOUT_NAME} isn't a JSON object. {REDO}")
    return about


def _samples(file: Path) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Return the samples of a file, each (length,) int64, and the source of each, if it says so."""
    try:
        check_file(file)
        with safe_open(file, framework="pt") as opened:
            names = {"tokens", "lengths"} | ({"sources"} & set(opened.keys()))
            tensors = {name: opened.get_tensor(name) for name in sorted(names)}
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{file} can't be read: {reason(error)}. {REDO}") from error
    except DataError as error:
        raise DataError(f"{file.parent} is no calibration directory: {error} {REDO}") from error
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int64 or tensor.dim() != 1:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise DataError(
                f"{file}: {name} is {kind} of {tensor.dim()} dimensions; it must be a list of "
                f"int64. {REDO}"
            )
    tokens, lengths = tensors["tokens"], tensors["lengths"]
    sources = tensors.get("sources", lengths[:0]).tolist()
    if len(lengths) < 2 or int(lengths.min()) < 1:  # noqa: PLR2004
        raise DataError(f"{file} must hold at least two samples, and none may be empty. {REDO}")
    if sum(lengths.tolist()) != len(tokens):
        raise DataError(
            f"{file}: the lengths of the samples add up to {sum(lengths.tolist())}, and there are "
            f"{len(tokens)} tokens. {REDO}"
        )
    if int(tokens.min()) < 0:
        raise DataError(f"{file} has token {int(tokens.min())}; none is below 0. {REDO}")
    if len(sources) not in (0, len(lengths)):
        raise DataError(
            f"{file} names the sources of {len(sources)} samples and has {len(lengths)}. {REDO}"
        )
    return tokens.split(lengths.tolist()), tuple(sources)
