"""The page: sections of one run, or of several side by side, as one HTML file."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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
from qtool.report.page.parts import Absent, Section
from qtool.report.page.repeating import repeating_section
from qtool.report.page.scores import scores_section
from qtool.report.page.side_by_side import side_by_side_section
from qtool.report.page.speeds import speeds_section
from qtool.report.page.summary import summary_section
from qtool.report.page.tuning import tuning_section

Builder = Callable[[Evidence], Section | Absent]
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
PIECES = re.compile(r"[^._/]+[._/]*|[._/]+")
"""Of a name that may go on in the next line."""
QUOTED, CODE = re.compile("`([^`]+)`"), r"<code>\1</code>"
MOST_NAMED = 3
"""Runs in the title."""
ODD = (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError)
"""What a section raises where a file isn't as qtool writes it."""
PAGE_MARK = b"<!DOCTYPE html>\n<!-- qtool report -->\n"
"""How the page begins: a file that begins otherwise isn't replaced by it."""


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
    environment.globals["draw"] = lambda *given: Markup(draw(*given))
    environment.globals["breakable"] = lambda text: Markup("<wbr>").join(PIECES.findall(text))
    environment.globals["prose"] = lambda text: Markup(QUOTED.sub(CODE, str(escape(text))))
    template = environment.from_string((folder / "page.html.jinja").read_text(encoding="utf-8"))
    runs = [(evidence, *_sections(evidence)) for evidence in _told_apart(many)]
    text = template.render(
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        title=_title([evidence.name for evidence, _, _ in runs]),
        together=side_by_side_section([one for one, _, _ in runs]) if len(runs) > 1 else None,
        runs=runs,
    )
    return PAGE_MARK + text.encode()


def _title(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= MOST_NAMED else f"{len(names)} runs"


def _sections(evidence: Evidence) -> tuple[dict[str, Section], list[str]]:
    """Return the sections that there is something for, and sentences on the others."""
    found, missing = {}, list(evidence.gaps)
    for name, build in BUILDERS.items():
        made = _built(build, name, evidence)
        if isinstance(made, Absent):
            missing.append(f"{made.title}: {made.why}")
        else:
            found[name] = made
    return found, missing


def _built(build: Builder, name: str, evidence: Evidence) -> Section | Absent:
    try:
        return build(evidence)
    except ODD as error:
        title = name.capitalize()
        return Absent(title, f"A file isn't as qtool writes it ({type(error).__name__}: {error}).")


def _told_apart(many: Sequence[Evidence]) -> Iterator[Evidence]:
    """Yield runs whose names differ."""
    names = [evidence.name for evidence in many]
    for number, evidence in enumerate(many, 1):
        repeated = names.count(evidence.name) > 1
        yield replace(evidence, name=f"{evidence.name} ({number})") if repeated else evidence
