"""Runs that are stopped, and what they leave."""

from pathlib import Path

from torch import Tensor

from qtool.base import Notice, Progress
from qtool.checkpoint.manifest import Manifest
from qtool.checkpoint.place import find_place
from qtool.checkpoint.spool import Made
from qtool.checkpoint.writer import CheckpointWriter

WEIGHTS = "model.safetensors"
CONFIG = {"quantization_config": Manifest(tool_version="0", recipe={}, layers={}).to_config()}


class Stop:
    """An `emit` that raises an error after some layers."""

    def __init__(self, after: int, error: type[BaseException]) -> None:
        self.after, self.error, self.layers = after, error, 0

    def __call__(self, event: Progress | Notice) -> None:
        self.layers += isinstance(event, Progress) and event.what == "quantize"
        if self.layers == self.after:
            raise self.error("on purpose")


def open_writer(out_dir: Path, *, overwrite=False, resume=False, **fingerprint):
    return CheckpointWriter(find_place(out_dir, overwrite=overwrite, resume=resume), fingerprint)


def add(writer: CheckpointWriter, name: str, tensor: Tensor) -> None:
    writer.once(name, lambda: Made(tensor))


def partial(out_dir: Path) -> Path:
    return out_dir.with_name(out_dir.name + ".partial")
