"""Write the pages of docs/ that come from the program: commands, methods, recipes, what fits where.

`python docs/generate.py` writes them, `--check` only compares and exits with 1 if one is stale.
The output depends on the code and on nothing else: not on terminal, locale or working directory.
"""

import argparse
import dataclasses
import inspect
import os
import subprocess
import sys
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path

import compatibility
import engines
import pnr_chart
import which_recipe

import qtool.methods
from qtool import plugins, settings
from qtool.base import Method
from qtool.cli.app import COMMANDS
from qtool.recipe.load import load_recipe
from qtool.recipe.names import built_in, find_recipe, in_folders
from qtool.steps.plan import load_method

DOCS = Path(__file__).parent
HELP_WIDTH = "88"
NOTE = "<!-- Written by docs/generate.py; change the code and run `make docs`. -->\n"
# What rich and typer look at to choose colours, widths and line characters.
TERMINAL = {
    "COLUMNS": HELP_WIDTH,
    "LINES": "50",
    "TERMINAL_WIDTH": HELP_WIDTH,
    "TERM": "dumb",
    "NO_COLOR": "1",
    "LC_ALL": "C.UTF-8",
    "PYTHONUTF8": "1",
    "PYTHONIOENCODING": "utf-8",
}
UNWANTED = (
    "FORCE_COLOR",
    "CLICOLOR_FORCE",
    "PY_COLORS",
    "TTY_COMPATIBLE",
    "TTY_INTERACTIVE",
    "GITHUB_ACTIONS",
    "_TYPER_FORCE_DISABLE_TERMINAL",
    "TYPER_USE_RICH",
)


def cli_page() -> str:
    """Return docs/cli.md: the help of each command, word for word."""
    lines = [
        "# Commands",
        "",
        NOTE,
        "Exit codes: 0 done, 1 an error (one line on stderr), 2 wrong usage, 3 a gate of `run` or",
        "a budget of a recipe's `check` failed, 130 interrupted. Results go to stdout; progress",
        "and errors go to stderr.",
    ]
    for command in ("", *COMMANDS):
        lines += ["", f"## {' '.join(('qtool', command)).strip()}", ""]
        lines += ["```text", help_text(command), "```"]
    lines += ["", "## Environment", "", "`qtool doctor` prints what is set.", ""]
    lines += ["| Variable | What it does |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in settings.VARIABLES.items()]
    return "\n".join(lines) + "\n"


def help_text(command: str) -> str:
    """Return what `qtool COMMAND --help` prints, without the spaces at the ends of lines."""
    environment = {key: value for key, value in os.environ.items() if key not in UNWANTED}
    arguments = [sys.executable, "-m", "qtool", *command.split(), "--help"]
    finished = subprocess.run(
        arguments,
        env={**environment, **TERMINAL},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        encoding="utf-8",
    )
    lines = [
        line.rstrip().replace("python -m qtool", "qtool") for line in finished.stdout.split("\n")
    ]
    return "\n".join(lines).strip("\n")


def methods_page() -> str:
    """Return docs/methods.md: what each method does and takes."""
    parts = [
        "# Methods",
        "",
        NOTE,
        "A recipe names one of these under `weights.method`, and sets its options under",
        "`weights.options`. `--method` and `--set weights.options.KEY=VALUE` do the same on the",
        "command line.",
    ]
    for name in plugins.names(qtool.methods):
        parts += ["", *method_section(name, load_method(name))]
    return "\n".join(parts) + "\n"


def method_section(name: str, method: Method) -> list[str]:
    """Return the lines on one method."""
    module = sys.modules[f"{qtool.methods.__name__}.{name}"]
    about = inspect.cleandoc(module.__doc__ or "")
    bits = f"{method.num_bits.start} to {method.num_bits.stop - 1}"
    lines = [f"## {name}", "", method.summary, "", about, "", f"Bits: {bits}."]
    if method.needs:
        lines[-1] += f" It needs calibration data ({statistics(method.needs)})."
    elif method.uses:
        lines[-1] += f" It takes calibration data if there is any ({statistics(method.uses)})."
    else:
        lines[-1] += " It takes no data."
    lines.append("")
    options = dataclasses.fields(method.options)
    types = typing.get_type_hints(method.options)  # without bounds
    if not options:
        return [*lines, "It has no options."]
    documented = plugins.attribute_docstrings(method.options)
    lines += ["| Option | Type | Default | Meaning |", "|---|---|---|---|"]
    for option in options:
        cells = (
            f"`{option.name}`",
            f"`{type_name(types[option.name])}`",
            default_of(option),
            documented.get(option.name, ""),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def statistics(names: Iterable[str]) -> str:
    """Return names of statistics in Markdown."""
    return ", ".join(f"`{name}`" for name in sorted(names))


def type_name(annotation: object) -> str:
    """Return a type as it is written in the source."""
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return name.replace("typing.", "")


def default_of(option: "dataclasses.Field[object]") -> str:
    """Return the default of an option in Markdown."""
    if option.default is not dataclasses.MISSING:
        return f"`{option.default!r}`"
    if option.default_factory is not dataclasses.MISSING:
        return f"`{option.default_factory()!r}`"
    return "required"


def recipes_page() -> str:
    """Return docs/recipes-list.md: the built-in recipes and what they say."""
    parts = [
        "# Built-in recipes",
        "",
        NOTE,
        "`--recipe NAME` takes these names. [recipes.md](recipes.md) explains the keys.",
    ]
    for name in (*built_in(), *in_folders()):
        text = find_recipe(name).read_text(encoding="utf-8").strip("\n")
        parts += ["", f"## {name}", "", load_recipe(name).description, ""]
        parts += ["```yaml", text, "```"]
    return "\n".join(parts) + "\n"


def decisions_page() -> str:
    """Return docs/adr/README.md: the decisions, by number."""
    parts = [
        "# Decisions",
        "",
        NOTE,
        "Architecture decision records (ADR): what was decided, and why.",
        "",
    ]
    for page in sorted((DOCS / "adr").glob("[0-9]*.md")):
        title = page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        parts.append(f"- [{title}]({page.name})")
    return "\n".join(parts) + "\n"


PAGES = {
    "adr/README.md": decisions_page,
    "cli.md": cli_page,
    "compatibility.md": lambda: compatibility.page(NOTE),
    "engines.md": lambda: engines.page(NOTE),
    "methods.md": methods_page,
    "recipes-list.md": recipes_page,
    "images/pnr.svg": pnr_chart.chart,
    "which-recipe.md": lambda: which_recipe.page(NOTE),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the pages; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if one is stale")
    options = parser.parse_args(arguments)
    for name, build in PAGES.items():
        page, text = DOCS / name, build()
        fresh = page.is_file() and page.read_text(encoding="utf-8") == text
        if fresh:
            continue
        if options.check:
            sys.stderr.write(f"docs/{name} is stale. Run `make docs` and commit the result.\n")
            return 1
        page.write_text(text, encoding="utf-8")
        sys.stdout.write(f"wrote docs/{name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
