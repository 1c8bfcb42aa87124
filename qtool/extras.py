"""What the optional parts need, as the installed metadata says it."""

import re
from importlib import metadata

DISTRIBUTION = "qtool-llm"
"""Its name as a package; the command and the import are `qtool`."""


def requirements(extra: str) -> tuple[str, ...]:
    """Return what an extra requires, such as `lm-eval<0.5,>=0.4.12`; empty if that isn't known."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # the source is run without being installed
        return ()
    wanted = re.compile(rf"extra == ['\"]{re.escape(extra)}['\"]")
    return tuple(line.partition(";")[0].strip() for line in lines if wanted.search(line))


def install_line(extra: str) -> str:
    """Return the command that installs what an extra requires and isn't here.

    It names the packages themselves: that works for a checkout as well as for a wheel.
    """
    wanted = requirements(extra)
    if not wanted:
        return f"pip install -e '.[{extra}]' in qtool's checkout"
    missing = [line for line in wanted if not _is_installed(line)]
    return f"pip install {' '.join(repr(line) for line in missing or wanted)}"


def _is_installed(requirement: str) -> bool:
    found = re.match(r"[\w.-]+", requirement)
    try:
        return found is not None and bool(metadata.version(found[0]))
    except metadata.PackageNotFoundError:
        return False
