"""What in a directory is qtool's: the work of a run by its job, a checkpoint by its files.

Nothing else is ever replaced or removed. Torch-free.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qtool.errors import CheckpointError
from qtool.storage.plain_json import write_json_file
from qtool.wording import quoted

JOB_NAME = "job.json"
CONFIG_NAME = "config.json"
REPORT_NAME = "quantization_report.json"
MARK = "the work of a run of qtool"
CARD_NAME, MEASURED_NAME = "README.md", "measured.json"
PAGE_NAME = "report.html"
RUN_FOLDER = "run"
RUN_NAMES = (
    *("check.json", "text.json", "tasks.json", "bench.json"),
    *("run.json", "junit.xml", "summary.md"),
)
"""What `qtool run` writes into a folder of a checkpoint: a file per step, and the verdict."""
WRITTEN_NAMES = (
    *(CONFIG_NAME, REPORT_NAME, CARD_NAME, MEASURED_NAME, PAGE_NAME),
    "model.safetensors.index.json",
    *(f"{RUN_FOLDER}/{name}" for name in RUN_NAMES),
)
SEAL = re.compile(r"\n<!-- Written by qtool, unedited: ([0-9a-f]{16}) -->\n\Z")
BEFORE_SEALS = "\nQuantized with qtool "
"""In the cards of versions that didn't seal them."""
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
HALF_WRITTEN = re.compile(r"\.[0-9a-f]{12}\.partial$")
OUR_METHOD = re.compile(rb'"quant_method"\s*:\s*"qtool"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What job.json in a work directory says: whose work it is, and how far its end has come."""

    fingerprint: Mapping[str, Any]
    is_stale: bool = False
    """Whether what lies beside belongs to a run that is being dropped."""
    files: tuple[str, ...] | None = None
    """Paths of the finished result, once all of them are on disk; None: layers are missing."""
    old_files: tuple[str, ...] | None = None
    """Paths of the checkpoint that gives way, once files are being moved one by one."""
    old_inode: int | None = None
    """Of the directory that gives way, once whole directories are being renamed."""
    aside: str | None = None
    """Name that it has for a while where names can't be exchanged."""


def write_job(directory: Path, job: Job) -> None:
    """Write job.json.

    Raises:
        OSError: it can't be written.
    """
    given = {name: value for name, value in asdict(job).items() if value is not None}
    write_json_file(directory / JOB_NAME, {"this is": MARK, **given})


def read_job(directory: Path) -> Job | None:
    """Return the job of a work directory; None if it bears no mark of ours, or a damaged one."""
    try:
        if directory.is_symlink() or (directory / JOB_NAME).is_symlink():
            return None
        values = json.loads((directory / JOB_NAME).read_text(encoding="utf-8"))
        if values.pop("this is") != MARK or not isinstance(values["fingerprint"], dict):
            return None
        for key in ("files", "old_files"):
            if key in values:
                values[key] = tuple(map(str, values[key]))
        if Path(values.get("aside", "a name")).name != values.get("aside", "a name"):
            return None
        return Job(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def names_in(directory: Path) -> set[str]:
    """Return the names of what lies in a directory."""
    return {path.name for path in directory.iterdir()}


def inode(path: Path) -> int | None:
    """Return the number of a file or directory, links not followed; None if there is none."""
    try:
        return path.lstat().st_ino
    except FileNotFoundError:
        return None


def is_checkpoint(directory: Path) -> bool:
    """Return whether config.json names qtool, even if the checkpoint is damaged otherwise."""
    try:
        content = (directory / CONFIG_NAME).read_bytes()
    except OSError:
        return False
    try:
        section = json.loads(content).get("quantization_config")
        return isinstance(section, dict) and section.get("quant_method") == "qtool"
    except (ValueError, AttributeError, RecursionError):
        return OUR_METHOD.search(content) is not None


def our_section(config: object, where: str) -> Mapping[str, Any]:
    """Return a `quantization_config` that is qtool's.

    Raises:
        CheckpointError: it isn't.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(
            f"{where}: quantization_config is {quoted(config)}; it must be an object. Copy the "
            "checkpoint again, or remove that if the weights aren't quantized."
        )
    found = config.get("quant_method")
    if found == "qtool":
        return config
    says = f"quant_method is {quoted(found)}, not 'qtool'"
    if found is None:
        says = "quantization_config names no quant_method, such as 'qtool'"
    raise CheckpointError(
        f"{where}: {says}. What other programs have quantized becomes a checkpoint by `qtool "
        "import`."
    )


def read_report(directory: Path) -> dict[str, Any]:
    """Return quantization_report.json; nothing if it is missing or damaged."""
    try:
        values = json.loads((directory / REPORT_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def foreign_entries(directory: Path) -> list[str]:
    """Return what lies in a checkpoint and wasn't written by qtool, sorted."""
    recorded = read_report(directory).get("files")
    ours = {*WRITTEN_NAMES, *(recorded if isinstance(recorded, list) else [])}
    if read_job(directory) is not None:
        ours.add(JOB_NAME)
    if not _may_replace_card(directory / CARD_NAME):
        ours.discard(CARD_NAME)
    found = {path for path in paths_below(directory) if path not in ours}
    return sorted({path for path in found if not (WEIGHTS.fullmatch(path) or _is_half(path))})


def _is_half(path: str) -> bool:
    """Return whether a run was killed while it wrote this, as `written_whole` calls it."""
    half = HALF_WRITTEN.search(path)
    return half is not None and path[: half.start()] in WRITTEN_NAMES


def sealed(card: str) -> str:
    """Return a model card with a last line that tells whether anybody has edited it since."""
    return f"{card}\n<!-- Written by qtool, unedited: {_card_digest(card)} -->\n"


def unsealed(card: str) -> str | None:
    """Return a sealed card without its last line; None: qtool didn't write it as it is."""
    card = card.replace("\r\n", "\n")
    seal = SEAL.search(card)
    content = card[: seal.start()] if seal is not None else ""
    return content if seal is not None and seal[1] == _card_digest(content) else None


def _card_digest(card: str) -> str:
    return hashlib.sha256(card.encode()).hexdigest()[:16]


def _may_replace_card(path: Path) -> bool:
    """Return whether qtool wrote what is there: nobody's own page is lost."""
    try:
        card = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return not path.exists()
    return unsealed(card) is not None or (BEFORE_SEALS in card and SEAL.search(card) is None)


def paths_below(directory: Path) -> Iterator[str]:
    """Yield the paths of all files, links and empty folders, relative, with `/`."""
    for folder, folders, files in os.walk(directory):
        here = Path(folder)
        links = [name for name in folders if (here / name).is_symlink()]
        for name in [*files, *links]:
            yield (here / name).relative_to(directory).as_posix()
        if not folders and not files and here != directory:
            yield here.relative_to(directory).as_posix()
