"""Names of lm-eval's tasks, read from its files: its own index takes ten seconds first."""

import difflib
import functools
import importlib.util
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from qtool.data.local_datasets import DataFolder, LocalSplits
from qtool.errors import DataError

_NAMES = re.compile(
    rb"^[ \t]*(?:- )?[\"']?(?:task|group|tag)[\"']?[ \t]*:[ \t]*[\"']?([\w.+:-]+)", re.MULTILINE
)

_DATASET = re.compile(
    rb"^[\"']?dataset_(path|name)[\"']?[ \t]*:[ \t]*[\"']?([\w./-]+)", re.MULTILINE
)


def check_spelling(names: Sequence[str]) -> None:
    """Refuse names that stand nowhere in lm-eval's files, before anything slow is imported.

    Of a name that does stand there lm-eval's index says later whether it is a task. Without lm-eval
    nothing is refused here.

    Raises:
        DataError: there is no task, group or tag of that name.
    """
    text = b"\n".join(_files().values())
    for name in names:
        alone = rb"(?<![\w.+-])" + re.escape(name.encode()) + rb"(?![\w.+-])"
        if text and not re.search(alone, text):
            raise DataError(describe_unknown(name, map(bytes.decode, set(_NAMES.findall(text)))))


def check_data(names: Sequence[str], data_dir: Path) -> None:
    """Refuse a folder that has no file at all of a task's data set, where that is known by name.

    Which splits a task reads lm-eval's index says later.

    Raises:
        DataError: there is no such folder, or none of the files is there.
    """
    folder = DataFolder(data_dir)
    for name in names:
        dataset, config = _dataset(name)
        if dataset is not None and not folder.mentions(dataset, name, config or name):
            splits = LocalSplits(folder, name, {"dataset_path": dataset, "dataset_name": config})
            splits.file_of("test")  # raises, and says what to put where


def _dataset(name: str) -> tuple[str | None, str | None]:
    """Return path and name of the data set that the file of a task or group names, or its folder.

    Neither, where that isn't a single one.
    """
    defines = re.compile(
        rb"^[\"']?(?:task|group)[\"']?:[ \t]*[\"']?%s[\"']?[ \t]*$" % re.escape(name.encode()),
        re.MULTILINE,
    )
    file = next((file for file, text in _files().items() if defines.search(text)), None)
    if file is None:
        return None, None
    own = dict(_DATASET.findall(_files()[file]))
    beside = b"\n".join(path.read_bytes() for path in file.parent.glob("*yaml*"))
    paths = (
        {own[b"path"]}
        if b"path" in own
        else {v for k, v in _DATASET.findall(beside) if k == b"path"}
    )
    named = own.get(b"name")
    return (paths.pop().decode() if len(paths) == 1 else None), named and named.decode()


def describe_unknown(name: str, known: Iterable[str]) -> str:
    """Return the sentence for an unknown task; lm-eval has too many to list."""
    near = difflib.get_close_matches(name, list(known), n=3)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    return f"lm-eval has no task, group or tag '{name}'.{hint} `lm-eval ls tasks` lists all."


@functools.cache
def _files() -> dict[Path, bytes]:
    """Return what lm-eval's files of tasks say; empty if lm-eval isn't installed."""
    spec = importlib.util.find_spec("lm_eval")
    folders = (spec.submodule_search_locations if spec is not None else None) or ()
    files = (path for folder in folders for path in Path(folder, "tasks").rglob("*.y*ml"))
    return {path: path.read_bytes() for path in files}
