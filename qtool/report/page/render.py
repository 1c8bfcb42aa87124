"""The page: sections of one run, or of several side by side, as one HTML file."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import resources

from qtool.errors import MissingExtraError
from qtool.report.page.bit_map import bit_map_section
from qtool.report.page.calibration import calibration_section
from qtool.report.page.cautions import cautions_section
from qtool.report.page.choices import choices_section
from qtool.report.page.costs import costs_section
from qtool.report.page.drawing import draw
from qtool.report.page.evidence import Evidence
from qtool.report.page.losses import losses_section
from qtool.report.page.parts import Absent, PageSection
from qtool.report.page.repeating import repeating_section
from qtool.report.page.scores import scores_section
from qtool.report.page.side_by_side import SIDE_BY_SIDE, side_by_side_section
from qtool.report.page.speeds import speeds_section
from qtool.report.page.summary import summary_section
from qtool.report.page.tuning import tuning_section
from qtool.wording import reason

Chapter = Callable[..., str]
"""Renders a section under a key, at a level of headings."""
Builder = Callable[[Evidence], PageSection | Absent]
BUILDERS: dict[str, Builder] = {
    "summary": summary_section,
    "evaluation": scores_section,
    "bits": bit_map_section,
    "losses": losses_section,
    "choices": choices_section,
    "calibration": calibration_section,
    "tuning": tuning_section,
    "costs": costs_section,
    "cautions": cautions_section,
    "speed": speeds_section,
    "repeat": repeating_section,
}
"""Sections in their order, by the name that links to them."""
PIECES = re.compile(r"[^._]+[._]*|[._]+")
"""Of a name that may go on in the next line."""
QUOTED, CODE = re.compile("`([^`]+)`"), r"<code>\1</code>"
MOST_NAMED = 3
"""Runs in the title."""
ODD = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)
"""What a section raises where a file isn't as qtool writes it."""
PAGE_MARK = b"<!DOCTYPE html>\n<!-- qtool report -->\n"
"""How the page begins: a file that begins otherwise isn't replaced by it."""


@dataclass(frozen=True, slots=True)
class RenderedRun:
    """A run as the page shows it."""

    key: str
    name: str
    titles: dict[str, str] = field(default_factory=dict)
    """Of the chapters, by what links to them."""
    chapters: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Sentences on what there is nothing for."""

    def add(self, key: str, make: Callable[[], PageSection | Absent], chapter: Chapter) -> None:
        """Add a section, or a sentence that says why there is none."""
        try:
            made = make()
            if isinstance(made, PageSection):
                self.chapters.append(chapter(made, key))
                self.titles[key] = made.title
            else:
                self.missing.append(f"{made.title}: {made.why}")
        except ODD as error:
            what = key.rpartition("-")[2].capitalize()
            self.missing.append(f"{what}: a file isn't as qtool writes it: {reason(error)}.")


def page(many: Sequence[Evidence]) -> bytes:
    """Return the page of these runs; the same bytes for the same runs.

    Raises:
        MissingExtraError: jinja2 or matplotlib isn't installed.
    """
    try:
        import jinja2
        from markupsafe import Markup, escape
    except ImportError:
        raise MissingExtraError("qtool report", "report") from None
    folder = resources.files("qtool.report.page")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {
        "draw": lambda *given: Markup(draw(*given)),
        "prose": lambda text: Markup(QUOTED.sub(CODE, str(escape(text)))),
        "breakable": lambda text: Markup("<wbr>").join(PIECES.findall(text)),
    }
    template = environment.from_string((folder / "page.html.jinja").read_text(encoding="utf-8"))
    chapter: Chapter = vars(template.module)["chapter"]
    several = len(many) > 1
    named = list(_told_apart(many))
    runs = [
        RenderedRun(f"run{n}", one.name, missing=list(one.gaps)) for n, one in enumerate(named, 1)
    ]
    for evidence, run in zip(named, runs, strict=True):
        for name, build in BUILDERS.items():
            made = partial(build, evidence)
            run.add(f"{run.key}-{name}", made, partial(chapter, level=3 if several else 2))
    together = RenderedRun("together", SIDE_BY_SIDE)
    if several:
        compared = partial(side_by_side_section, named)
        together.add("together", compared, partial(chapter, level=2))
    text = template.render(
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        title=_title([evidence.name for evidence in named]),
        together=together,
        runs=runs,
    )
    return PAGE_MARK + text.encode()


def _title(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= MOST_NAMED else f"{len(names)} runs"


def _told_apart(many: Sequence[Evidence]) -> Iterator[Evidence]:
    """Yield runs whose names differ."""
    names = [evidence.name for evidence in many]
    for number, evidence in enumerate(many, 1):
        repeated = names.count(evidence.name) > 1
        yield replace(evidence, name=f"{evidence.name} ({number})") if repeated else evidence
