"""Names of lm-eval's tasks, read from its files: its own index takes ten seconds first."""

import difflib
import importlib.util
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from qtool.errors import DataError

_NAMES = re.compile(
    rb"^[ \t]*(?:- )?[\"']?(?:task|group|tag)[\"']?[ \t]*:[ \t]*[\"']?([\w.+:-]+)", re.MULTILINE
)


def check_spelling(names: Sequence[str]) -> None:
    """Refuse names that stand nowhere in lm-eval's files, before anything slow is imported.

    Of a name that does stand there lm-eval's index says later whether it is a task. Without lm-eval
    nothing is refused here.

    Raises:
        DataError: there is no task, group or tag of that name.
    """
    text = _text()
    for name in names:
        alone = rb"(?<![\w.+-])" + re.escape(name.encode()) + rb"(?![\w.+-])"
        if text and not re.search(alone, text):
            raise DataError(describe_unknown(name, map(bytes.decode, set(_NAMES.findall(text)))))


def describe_unknown(name: str, known: Iterable[str]) -> str:
    """Return the sentence for an unknown task; lm-eval has too many to list."""
    near = difflib.get_close_matches(name, list(known), n=3)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    return f"lm-eval has no task, group or tag '{name}'.{hint} `lm-eval ls tasks` lists all."


def _text() -> bytes:
    """Return all that lm-eval's files of tasks say; empty if lm-eval isn't installed."""
    spec = importlib.util.find_spec("lm_eval")
    folders = (spec.submodule_search_locations if spec is not None else None) or ()
    files = (path for folder in folders for path in Path(folder, "tasks").rglob("*.y*ml"))
    return b"\n".join(path.read_bytes() for path in files)
