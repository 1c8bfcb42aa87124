"""What the pages of the documentation say, taken apart."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import ROOT

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)

PUT_INTO = re.compile(r"Put\s+this\s+into\s+`([^`]+)`")

PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "docs/adr/*.md", "recipes/*.md", "kernels/*.md")
    for page in ROOT.glob(pattern)
)
"""All of them; the log and the changelog tell of what once was."""
CURRENT = [page for page in PAGES if page.name not in ("log.md", "CHANGELOG.md")]


@dataclass(frozen=True)
class Line:
    """A command line of a page."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def made_files(page: Path) -> list[Path]:
    """Return the files that a page lets its reader write, relative to the repository."""
    return [Path(name) for name in PUT_INTO.findall(page.read_text(encoding="utf-8"))]


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path, *languages: str) -> list[str]:
    """Return the blocks of code in some languages."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [text for language, text in found if language in languages]


def spans(page: Path) -> list[str]:
    """Return what stands between single backticks outside of blocks."""
    return [" ".join(text.split()) for text in SPAN.findall(prose(page))]


def command_lines(page: Path) -> Iterator[Line]:
    """Yield the lines of blocks that call qtool."""
    for block in blocks(page, "", "sh", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = tuple(shlex.split(line, comments=True))
            if words[:1] == ("qtool",):
                yield Line(str(page.relative_to(ROOT)), words)


def anchors(page: Path) -> set[str]:
    """Return what a link may have after '#', as the usual sites make it of headings."""
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(prose(page)))
    return {heading.replace(" ", "-") for heading in plain}
