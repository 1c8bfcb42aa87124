"""GGUF files by llama.cpp, timed beside ours: a process of its own, by any Python that has it."""

import ast
import importlib.util
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from qtool.errors import BackendError
from qtool.timing import llama_cpp_child
from qtool.timing.cpu import CpuBench, CpuSpeed
from qtool.wording import shown

MODULE = "llama_cpp"
CHILD_SECONDS = 1800


def python_with_llama(wanted: str | None) -> str:
    """Return the Python that times GGUF files.

    Args:
        wanted: What the user names; None: this one.

    Raises:
        BackendError: this one hasn't llama-cpp-python, and no other was named.
    """
    if wanted is None and importlib.util.find_spec(MODULE) is None:
        raise BackendError(
            "Timing a GGUF file needs llama-cpp-python, which isn't installed here. Install it "
            "(pip install llama-cpp-python), or name a Python that has it with --llama-python."
        )
    return wanted or sys.executable


def time_gguf(path: Path, python: str, bench: CpuBench) -> list[CpuSpeed]:
    """Return the speed of a GGUF file by each number of threads.

    Raises:
        BackendError: llama.cpp doesn't run it; the message has what it said last.
    """
    protocol, threads = bench.protocol, list(bench.processor.read_bandwidth)
    numbers = (protocol.prompt_tokens, protocol.context_tokens, protocol.decode_tokens)
    text = Path(llama_cpp_child.__file__).read_text(encoding="utf-8")  # -c: nothing shadows imports
    program = [python, "-c", text, str(path)]
    arguments = [",".join(map(str, threads)), *map(str, numbers), str(protocol.repeats)]
    told = _run([*program, *arguments], path)
    size = int(told["weight_bytes"])
    speeds = []
    for count in threads:
        read, decode = (statistics.median(told[what][count]) for what in ("prefill", "decode"))
        rate = protocol.decode_tokens / decode
        speeds.append(
            CpuSpeed(
                name=path.name,
                by=f"llama.cpp, {told['version']}",
                threads=count,
                prefill_tokens_per_second=protocol.prompt_tokens / read,
                decode_tokens_per_second=rate,
                weight_bytes=size,
                bandwidth_share=rate * size / bench.processor.read_bandwidth[count],
            )
        )
    return speeds


def _run(command: list[str], path: Path) -> dict[str, Any]:
    """Return what the child prints."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=CHILD_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"llama.cpp can't be run by {shown(command[0])}: {error}") from error
    if done.returncode != 0:
        lines = (done.stderr.strip() or "no message").splitlines()
        raise BackendError(f"llama.cpp doesn't run {shown(str(path))}: {shown(lines[-1])}.")
    result: dict[str, Any] = ast.literal_eval(done.stdout.splitlines()[-1])
    return result
