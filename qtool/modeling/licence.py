"""The licence of a model, where models say it: in the front matter of README.md, or in a file."""

from pathlib import Path

import yaml

FRONT_BYTES = 2**16
LICENCE_KEYS = ("license", "license_name", "license_link")
LICENCE_FILES = {  # what a file begins with, in small letters and single spaces
    "apache license version 2.0": "apache-2.0",
    "mit license": "mit",
}


def read_licence(directory: Path) -> dict[str, str]:
    """Return the keys of a model card on the licence of a model; empty if it doesn't say."""
    try:
        with (directory / "README.md").open("rb") as opened:
            head = opened.read(FRONT_BYTES).decode("utf-8-sig", errors="replace")
        front = yaml.safe_load(head.split("---", 2)[1]) if head.startswith("---") else None
    except (OSError, yaml.YAMLError, ValueError, RecursionError, IndexError):
        front = None
    said = front if isinstance(front, dict) else {}
    keys = {key: said[key] for key in LICENCE_KEYS if isinstance(said.get(key), str)}
    return keys if "license" in keys else _licence_of_file(directory)


def _licence_of_file(directory: Path) -> dict[str, str]:
    for path in sorted(directory.glob("LICEN[CS]E*")):
        try:
            with path.open("rb") as opened:
                text = opened.read(2**10).decode("utf-8-sig", errors="replace")
        except OSError:
            continue
        words = " ".join(text.lower().split())
        for begin, name in LICENCE_FILES.items():
            if words.startswith(begin):
                return {"license": name}
    return {}
