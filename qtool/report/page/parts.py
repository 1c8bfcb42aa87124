"""What a page is made of; the template knows how each part looks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from qtool.report.lengths import Axes


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell with a background of its own, which its text says as well."""

    text: str
    background: str = ""
    """Colour as #rrggbb; empty: the page's."""
    ink: str = ""
    """Of the text."""


MOST_ROWS = 20
"""Of a long table that are shown."""
MOST_LETTERS = 62
"""Of a line of a table in half of a page."""


def _text(cell: str | Cell) -> str:
    return cell if isinstance(cell, str) else cell.text


@dataclass(frozen=True, slots=True)
class PageTable:
    """A table; a column written as `>name` has its cells at the right."""

    kind: ClassVar[str] = "grid"
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | Cell, ...], ...]
    """The first cell of each is its header."""
    dense: bool = False
    """Cells are small and stand close: a map."""

    @property
    def is_wide(self) -> bool:
        """Return whether it doesn't fit beside another part."""
        texts = [[_text(cell) for cell in row] for row in (self.columns, *self.rows)]
        longest = [max(map(len, column)) for column in zip(*texts, strict=True)]
        return sum(longest) + 2 * len(longest) > MOST_LETTERS


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawing with what it shows, in words."""

    kind: ClassVar[str] = "picture"
    title: str
    description: str
    paint: Callable[[Axes], None]
    """Is given matplotlib's axes: see `drawing.draw`."""


@dataclass(frozen=True, slots=True)
class Words:
    """A paragraph."""

    kind: ClassVar[str] = "words"
    text: str


@dataclass(frozen=True, slots=True)
class Lines:
    """A list of sentences."""

    kind: ClassVar[str] = "lines"
    items: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Code:
    """What is to be copied, such as a command or a recipe."""

    kind: ClassVar[str] = "code"
    label: str
    text: str


@dataclass(frozen=True, slots=True)
class KeyNumbers:
    """A few figures that matter most: (name, value, what it is to be compared with)."""

    kind: ClassVar[str] = "tiles"
    items: tuple[tuple[str, str, str], ...]


Part = PageTable | Picture | Words | Lines | Code | KeyNumbers


@dataclass(frozen=True, slots=True)
class PageSection:
    """Parts under a heading."""

    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Absent:
    """A section that a directory has nothing for."""

    title: str
    why: str
    """A sentence, with what would bring it."""
