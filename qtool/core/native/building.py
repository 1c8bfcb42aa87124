"""How the library of kernels/cpu is compiled, and the name that says what it was compiled from.

Needs the standard library alone: the build of a wheel runs this file by itself.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

COMPILERS = ("cc", "gcc", "clang")
COMMON_FLAGS = (
    "-O3",
    "-std=c11",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wno-psabi",
    "-fPIC",
    "-shared",
    "-pthread",
)
AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2")
AVX512 = tuple(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vbmi", "vnni"))
X86: Mapping[str, tuple[str, ...]] = {
    "avx512": (*AVX2, *AVX512, "-mprefer-vector-width=512"),
    "avx2": AVX2,
    "plain": (),
}
NEEDED = {
    "avx512": ("avx2", "f16c", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512_vnni"),
    "avx2": ("avx2", "fma", "f16c", "bmi1", "bmi2"),
}
"""What Linux must list of a processor."""
MACHINES = {"x86_64": X86, "AMD64": X86}
SOURCES = (
    *("team.c", "panels.c", "linear.c", "decode.c", "prompt.c"),
    *("columns.c", "groups.c", "fits.c"),
)
TIMEOUT_S = 300
LONGEST_COMPLAINT = 300


def instruction_levels() -> Mapping[str, tuple[str, ...]]:
    """Return the flags of each level of instructions of this kind of machine, the best first."""
    return MACHINES.get(platform.machine(), {"plain": ()})


def file_name(kernels: Path, level: str) -> str:
    """Return the name of a library: it has a digest of text, flags and machine."""
    return f"qtool-cpu-{level}-{fingerprint(kernels, level)}.so"


def fingerprint(kernels: Path, level: str) -> str:
    """Return a digest of the text in a folder, the flags of a level and the kind of machine."""
    made_of = hashlib.sha256()
    for word in (
        *COMMON_FLAGS,
        *instruction_levels()[level],
        platform.system(),
        platform.machine(),
    ):
        made_of.update(f"{word}\n".encode())
    for path in sorted(kernels.glob("*.[ch]")):
        made_of.update(path.name.encode() + b"\n" + path.read_bytes() + b"\n")
    return made_of.hexdigest()[:20]


def compiler() -> str | None:
    """Return the path of a C compiler; None: there is none."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def compile_library(kernels: Path, level: str, target: Path) -> str | None:
    """Compile a library for a level; nobody ever sees half of it under its name.

    Returns:
        None, or a sentence that says why there is none.
    """
    found = compiler()
    if found is None:
        return f"it needs a C compiler: none of {', '.join(COMPILERS)} is in $PATH. Install one."
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            complaint = _run([found, *_arguments(kernels, level), "-o", str(made), "-lm"])
            if complaint is None:
                os.replace(made, target)  # noqa: PTH105 - the words for what this is
            return complaint
    except OSError as error:
        return f"its library can't be written to {target.parent}: {error.strerror}."


def _arguments(kernels: Path, level: str) -> list[str]:
    """Return what a compiler is told, but for the result."""
    name = f'-DQT_FINGERPRINT="{fingerprint(kernels, level)}"'
    files = [str(kernels / file) for file in SOURCES]
    return [*COMMON_FLAGS, *instruction_levels()[level], "-D_GNU_SOURCE", name, *files]


def _run(command: list[str]) -> str | None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.split())[:LONGEST_COMPLAINT]
        return f"{command[0]} doesn't compile its library: {said or error.returncode}."
    except subprocess.TimeoutExpired:
        return f"{command[0]} hasn't compiled its library in {TIMEOUT_S} seconds."
    return None
