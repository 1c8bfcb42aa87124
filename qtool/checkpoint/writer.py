"""CheckpointWriter: streaming, sharded, atomic, resumable.

Finished layers are spooled one by one into `OUT_DIR.partial/layers`; `finish` copies their bytes
into shards, writes config.json last and renames the directory. So memory is bounded by one layer,
a stopped run continues where it was, and a directory that has config.json is complete.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.checkpoint.manifest import LayerEntry
from qtool.checkpoint.shards import INDEX_NAME, SINGLE_NAME, read_json
from qtool.checkpoint.stream import Piece, pieces_of, write_shard
from qtool.errors import OutputError

MAX_SHARD_BYTES = 4 * 2**30
JOB_NAME = "job.json"


class CheckpointWriter:
    """Writes one checkpoint; use as a context manager.

    Leaving the block after an error removes everything; after KeyboardInterrupt or a kill the
    finished layers stay for `resume`.
    """

    def __init__(
        self, out_dir: Path, *, fingerprint: Mapping[str, Any], overwrite: bool, resume: bool
    ) -> None:
        """Prepare `OUT_DIR.partial`.

        Args:
            out_dir: Where the finished checkpoint goes.
            fingerprint: JSON-able; all that decides the output. A resumed run must have the same.
            overwrite: Replace an existing checkpoint, at the very end.
            resume: Continue the unfinished run in `OUT_DIR.partial`.

        Raises:
            OutputError: the directory exists, can't be written, or an unfinished run is in the way.
        """
        self.out_dir = out_dir
        self.work_dir = out_dir.with_name(out_dir.name + ".partial")
        self._layers = self.work_dir / "layers"
        self._names: list[str] = []
        check_replaceable(out_dir, overwrite=overwrite)
        with _one_line(out_dir):
            self._claim(
                json.loads(json.dumps(dict(fingerprint))), overwrite=overwrite, resume=resume
            )

    def _claim(self, fingerprint: dict[str, Any], *, overwrite: bool, resume: bool) -> None:
        job = self.work_dir / JOB_NAME
        if self.work_dir.exists() and not resume:
            if not overwrite:
                raise OutputError(
                    f"{self.work_dir} holds an unfinished run. Continue it with --resume, "
                    "or start over with --overwrite."
                )
            shutil.rmtree(self.work_dir)
        if self.work_dir.exists():
            old = read_json(job) if job.is_file() else {}
            changed = sorted(k for k in {*old, *fingerprint} if old.get(k) != fingerprint.get(k))
            if changed:
                raise OutputError(
                    f"{self.work_dir} was started with another {' and '.join(changed)}; "
                    "resuming would mix two runs. Start over with --overwrite."
                )
        self._layers.mkdir(parents=True, exist_ok=True)
        _write_json(job, fingerprint)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, Exception):
            shutil.rmtree(self.work_dir, ignore_errors=True)

    def finished(self, name: str) -> dict[str, Any] | None:
        """Return the notes of a layer that an earlier run finished; None if it didn't."""
        path = self._spool(name)
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            notes: dict[str, Any] = json.loads(file.metadata()["notes"])
        return notes

    def load(self, name: str, entry: LayerEntry) -> QuantizedTensor:
        """Return a finished layer."""
        with safe_open(self._spool(name), framework="pt") as file:
            parts = {part: file.get_tensor(f"{name}.{part}") for part in entry.layout()}
        return QuantizedTensor(entry.format, entry.scheme, entry.shape, parts)

    def keep(self, name: str) -> None:
        """Take a layer that `finished` knows into the checkpoint as it is."""
        self._names.append(name)

    def add(
        self,
        name: str,
        value: QuantizedTensor | Tensor,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Write one layer (its parts become `<name>.<part>`) or one plain tensor.

        Args:
            name: Dotted name of the layer, or full name of the tensor.
            value: What to write.
            notes: JSON-able; what `finished` returns after a resume. Not in the checkpoint.

        Raises:
            OutputError: the disk is full or the directory has become unwritable.
        """
        if isinstance(value, QuantizedTensor):
            tensors = {f"{name}.{part}": tensor for part, tensor in value.parts.items()}
        else:
            tensors = {name: value}
        on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        path = self._spool(name)
        temporary = path.with_suffix(".tmp")
        with _one_line(self.out_dir):
            save_file(on_cpu, temporary, {"notes": json.dumps(notes or {})})
            temporary.replace(path)
        self._names.append(name)

    def _spool(self, name: str) -> Path:
        # Quoted: a name is the model's, not ours, and '/' in it must not lead anywhere.
        return self._layers / f"{quote(name, safe='')}.safetensors"

    def finish(self, files: Mapping[str, bytes], config: Mapping[str, Any]) -> None:
        """Assemble the shards, write config.json last, move the directory to its place.

        Args:
            files: Other files by name: tokenizer, model card, report.
            config: Content of config.json, with `quantization_config`.
        """
        with _one_line(self.out_dir):
            self._assemble()
            for name, content in files.items():
                (self.work_dir / name).write_bytes(content)
            shutil.rmtree(self._layers)
            (self.work_dir / JOB_NAME).unlink()
            _write_json(self.work_dir / "config.json", config)
            _sync_directory(self.work_dir)
            _replace_directory(self.work_dir, self.out_dir)

    def _assemble(self) -> None:
        """Copy the spooled tensors into shards of bounded size, dropping each when copied."""
        shards = list(_fill_shards([pieces_of(self._spool(name)) for name in self._names]))
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            file_name = SINGLE_NAME
            if len(shards) > 1:
                file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_shard(self.work_dir / file_name, shard)
            weight_map.update({piece.name: file_name for piece in shard})
        if len(shards) > 1:
            total = sum(piece.num_bytes for shard in shards for piece in shard)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(self.work_dir / INDEX_NAME, index)


def _fill_shards(layers: list[list[Piece]]) -> Iterator[list[Piece]]:
    """Yield shards of bounded size; the parts of one layer stay together."""
    shard: list[Piece] = []
    size = 0
    for layer in layers:
        layer_bytes = sum(piece.num_bytes for piece in layer)
        if shard and size + layer_bytes > MAX_SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard += layer
        size += layer_bytes
    yield shard


def check_replaceable(out_dir: Path, *, overwrite: bool) -> None:
    """Check that `out_dir` may be written, before any work is done.

    Raises:
        OutputError: it exists without `overwrite`, or holds something that is no checkpoint.
    """
    if out_dir.exists():
        if not out_dir.is_dir():
            raise OutputError(f"{out_dir} is a file. Name a directory that doesn't exist yet.")
        entries = {path.name for path in out_dir.iterdir()}
        if entries and not overwrite:
            raise OutputError(f"{out_dir} exists. Pass --overwrite to replace it.")
        if entries and "config.json" not in entries:
            raise OutputError(
                f"{out_dir} exists and holds no checkpoint; --overwrite doesn't delete that. "
                "Remove it yourself, or name another directory."
            )
    parent = next(path for path in out_dir.absolute().parents if path.exists())
    if not os.access(parent, os.W_OK) or not parent.is_dir():
        raise OutputError(f"{parent} isn't a directory that can be written.")


def check_free_space(out_dir: Path, num_bytes: int) -> None:
    """Raise OutputError if the disk of `out_dir` can't hold `num_bytes` and one shard more."""
    parent = next(path for path in out_dir.absolute().parents if path.exists())
    needed = num_bytes + min(num_bytes, MAX_SHARD_BYTES)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"{parent} has {free / 1e9:.2f} GB free; writing {out_dir.name} takes "
            f"{needed / 1e9:.2f} GB for a while. Free some space or choose another disk."
        )


@contextlib.contextmanager
def _one_line(out_dir: Path) -> Iterator[None]:
    """Turn failures of the file system into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"The disk of {out_dir} is full. Free some space.") from error
        raise OutputError(f"Can't write {out_dir}: {error.strerror or error}.") from error
    except SafetensorError as error:
        # safetensors wraps the system's error in its own type, with the text of the system.
        if "No space left" in str(error):
            raise OutputError(f"The disk of {out_dir} is full. Free some space.") from error
        raise OutputError(f"Can't write {out_dir}: {error}.") from error


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_directory(source: Path, target: Path) -> None:
    """Move `source` to `target`, replacing a checkpoint that is there."""
    old = target.with_name(f"{target.name}.replaced-{os.getpid()}")
    if target.exists():
        target.replace(old)
    source.replace(target)
    _sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)
