"""Every command, option, name, link and example of the documentation is what the product has."""

import re
from pathlib import Path

import pytest

import qtool.methods
import qtool.training.adapters
import qtool.training.recipes
from qtool import plugins
from qtool.cli import app
from qtool.recipe.names import built_in, in_folders
from tests.docs.pages import (
    CURRENT,
    LINK,
    PAGES,
    Line,
    anchors,
    blocks,
    command_lines,
    made_files,
    prose,
    spans,
)
from tests.helpers import ROOT

COMMANDS = {name: app.load_command(name) for name in app.COMMANDS}
LINES = [line for page in CURRENT for line in command_lines(page)]
OTHERS = {  # of pip, pytest, docs/generate.py, lm-eval, nvcc, bwrap and the like
    *("--check", "--no-deps", "--model", "--gen_kwargs", "--version", "--install-completion"),
    *("--show-completion", "--help", "--tmpfs", "--size", "--die-with-parent"),
}
KNOWN = OTHERS | {
    name
    for command in COMMANDS.values()
    for option in command.params
    for name in (*option.opts, *option.secondary_opts)
}
MADE = [file for page in CURRENT for file in made_files(page)]
SETTINGS = re.compile(r"\bQTOOL_[A-Z_]+\b")
PATHS = re.compile(r"^(?:qtool|tests|kernels|recipes|docs)/[\w./-]+\.\w+$")


def test_there_are_commands_to_check():
    assert len(LINES) > 25
    assert {line.words[1] for line in LINES} >= {"quantize", "eval", "bench", "calibrate"}


@pytest.mark.parametrize("line", LINES, ids=str)
def test_command_line_is_understood(line: Line):
    _, name, *arguments = line.words
    assert name in COMMANDS
    context = COMMANDS[name].make_context(name, list(arguments))
    method, recipe = context.params.get("method"), context.params.get("recipe")
    if isinstance(recipe, list | tuple):  # those of `grid`, which may be none
        recipe = recipe[-1] if recipe else None
    made = {file.stem for file in MADE}
    known = (
        plugins.command_names(qtool.training.adapters)
        if name == "adapt"
        else plugins.names(qtool.methods)
    )
    assert method in {None, *known, *made}
    assert (
        recipe is None
        or recipe in {*built_in(), *in_folders(), *made}
        or recipe.endswith(".yaml")
        or (name == "train" and recipe in plugins.command_names(qtool.training.recipes))
    )


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_options_and_commands_in_the_text_exist(page):
    for span in spans(page):
        words = span.split()
        if words[0] == "qtool" and len(words) > 1 and re.fullmatch(r"[a-z]+", words[1]):
            assert words[1] in COMMANDS, span
        if words[0] in ("qtool", *COMMANDS) or words[0].startswith("--"):
            options = {word.split("=")[0].rstrip(".,:") for word in words if word.startswith("--")}
            assert options <= KNOWN, span


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_settings_files_and_targets_in_the_text_exist(page):
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "qtool").rglob("*.py"))
    for name in SETTINGS.findall(page.read_text(encoding="utf-8")):
        assert name in source, name
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for span in spans(page):
        if PATHS.match(span) and not re.search(r"NAME|MODEL_TYPE", span) and Path(span) not in MADE:
            assert (ROOT / span).exists(), span
        made = re.match(r"make ([a-z0-9-]+)", span)
        assert made is None or made[1] in targets, span


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_python_of_a_page_compiles(page):
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


def test_no_page_sends_anyone_to_an_index_for_qtool():
    for page in CURRENT:
        for text in (*spans(page), *blocks(page, "", "sh", "bash")):
            assert not re.search(r"pip install [^\n]*\bqtool(?:-llm)?(?:\[|['\"\s]|$)", text), text


NUMBER = re.compile(r"\d*\.\d+")
TROUBLES = ROOT / "docs/troubleshooting.md"


def rows_with_numbers(text: str) -> set[str]:
    """Return the numbers in the tables of a text, names of recipes and links left out."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return {number for row in rows for number in NUMBER.findall(re.sub(r"\(#.*?\)", "", row))}


@pytest.mark.parametrize(
    ("page", "least"), [("README.md", 30), ("docs/results.md", 80)], ids=["readme", "results"]
)
def test_results_stand_in_the_log_or_with_the_kernels(page, least):
    text = (ROOT / page).read_text(encoding="utf-8")
    results = text.partition("## Results")[2].partition("\n## ")[0] if page == "README.md" else text
    known = (ROOT / "docs/log.md").read_text(encoding="utf-8")
    known += (ROOT / "kernels/README.md").read_text(encoding="utf-8")
    numbers = rows_with_numbers(results)
    assert len(numbers) > least
    measured = {float(number) for number in re.findall(r"\d*\.?\d+", known)}

    def is_measured(number: str) -> bool:
        half = 0.5 * 10 ** -len(number.partition(".")[2]) + 1e-9
        return any(abs(float(number) - value) <= half for value in measured)

    assert [number for number in sorted(numbers) if not is_measured(number)] == []


def test_messages_in_troubleshooting_are_those_of_the_program():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "qtool").rglob("*.py")]
    said = "\n".join(re.sub(r'"\s*(?:\+ )?f?"', "", source) for source in sources)
    rows = [line for line in TROUBLES.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    messages = [span for row in rows for span in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    pieces = [piece.strip() for message in messages for piece in message.split("...")]
    assert len(pieces) > 30
    assert [piece for piece in pieces if piece not in said] == []
