"""The part of `bench` that sweeps threads on the CPU, and times GGUF files beside ours."""

from pathlib import Path

import torch

from qtool.base import Emit, Progress
from qtool.data.windows import positions_of
from qtool.errors import BackendError
from qtool.modeling.config import parse_config, read_config
from qtool.modeling.device import default_device, free_memory
from qtool.modeling.load import LoadedModel, load_model
from qtool.modeling.locate import Location
from qtool.storage.jsonl import check_file
from qtool.timing.cpu import CpuBench, CpuResult, CpuSpans, CpuSpeed, protocol_for
from qtool.timing.gguf_peers import python_with_llama, time_gguf
from qtool.timing.processor import describe_processor, thread_counts, usable_cores


def check_sweep(gguf_files: tuple[Path, ...], llama_python: str | None) -> str:
    """Return the Python that times GGUF files, before a model is opened; '' if there are none.

    Raises:
        BackendError: there is no llama.cpp, or models run on a card.
        DataError: a file isn't there.
    """
    if not gguf_files:
        return ""
    if default_device().type != "cpu":
        raise BackendError(
            "GGUF files are timed on the CPU, and the model runs on a card. Give --device cpu."
        )
    for file in gguf_files:
        check_file(file)
    return python_with_llama(llama_python)


def open_sweep(model: Location, gguf_files: tuple[Path, ...], python: str) -> "CpuSweep | None":
    """Return what times models on the CPU, and files by a Python; None: they run on a card."""
    if default_device().type != "cpu":
        return None
    parsed = parse_config(read_config(model.directory), model.directory)
    protocol = protocol_for(positions_of(parsed))
    processor = describe_processor(thread_counts(usable_cores()))
    return CpuSweep(CpuBench(processor, protocol), gguf_files, python)


class CpuSweep:
    """Collects speeds of one model after the other."""

    def __init__(self, bench: CpuBench, gguf_files: tuple[Path, ...], python: str) -> None:
        self._bench, self._files, self._python = bench, gguf_files, python
        self._speeds: list[CpuSpeed] = []
        self._spans: CpuSpans | None = None
        self._not_run: dict[str, str] = {}

    def add(self, loaded: LoadedModel, emit: Emit, *, is_last: bool) -> None:
        """Time a loaded model; of the last one also the parts of a step."""
        emit(Progress(f"time {loaded.name} by threads"))
        self._speeds += self._bench.speeds(loaded, loaded.name)
        if is_last:
            self._spans = self._bench.spans(loaded)

    def add_rounded(self, model: Location, emit: Emit) -> None:
        """Load an original in bfloat16 and time it."""
        emit(Progress(f"time {model.name} in bfloat16"))
        loaded = load_model(model, dtype=torch.bfloat16)
        self._speeds += self._bench.speeds(loaded, loaded.name)
        del loaded
        free_memory()

    def result(self, emit: Emit) -> CpuResult:
        """Time what llama.cpp runs, and return all."""
        for path in self._files:
            emit(Progress(f"time {path.name} by llama.cpp"))
            try:
                self._speeds += time_gguf(path, self._python, self._bench)
            except BackendError as error:
                self._not_run[path.name] = str(error)
        bench = self._bench
        speeds = tuple(self._speeds)
        return CpuResult(bench.processor, bench.protocol, speeds, self._spans, self._not_run)
