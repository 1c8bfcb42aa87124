"""Help, versions and usage errors: no torch, no traceback."""

import json
import re
import subprocess
import sys

import pytest

import qtool
import qtool.training.adapters
import qtool.training.recipes
from qtool import plugins, training
from qtool.cli.app import COMMANDS, load_command
from qtool.recipe.values import MOST_SEED
from tests.cli.conftest import Cli
from tests.helpers import run_python


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_is_printed_and_exits_with_0(cli: Cli, command):
    done = cli(*command, "--help")
    assert done.code == 0
    assert "Usage" in done.out
    assert done.err == ""


@pytest.fixture(scope="module")
def narrow():
    """Return the help of each command in a terminal of 80 columns, by one process for all."""
    code = (
        "import contextlib, io, json, sys\n"
        "from qtool.cli.app import COMMANDS, app\n"
        "shown = {}\n"
        "for name in COMMANDS:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as printed:\n"
        "        try:\n            app([name, '--help'])\n"
        "        except SystemExit as stop:\n            assert not stop.code\n"
        "    shown[name] = printed.getvalue()\n"
        "print(json.dumps(shown))\n"
    )
    terminal = {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}
    return json.loads(run_python(code, environment=terminal))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_stands_whole_in_the_help_of_a_narrow_terminal(command, narrow):
    options = load_command(command).params
    names = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    shown = narrow[command]
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    words = set(re.split(r"[\s│,]+", shown))
    assert {name for name in names if name.startswith("--")} <= words


def test_commands_are_listed_by_the_first_line_of_their_help(cli: Cli):
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", cli("--help").out).split())
    for name, line in COMMANDS.items():
        assert load_command(name).help.splitlines()[0] == line
        assert f" {name} {line}" in shown


@pytest.mark.parametrize("command", ["calibrate", "quantize", "eval", "bench", "inspect"])
def test_every_command_summarises_itself_in_a_sentence(cli: Cli, command):
    text = " ".join(cli(command, "--help").out.split())
    assert re.search(r"Usage: \S+ \S+.*? [A-Z][^.]+\.", text)


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {"methods", "recipes", "doctor"}))
def test_help_of_whatever_takes_arguments_shows_examples(cli: Cli, command):
    assert f"qtool {command}" in cli(command, "--help").out.split("Examples")[1]


@pytest.mark.parametrize(
    ("command", "folder"), [("train", training.recipes), ("adapt", training.adapters)]
)
def test_help_names_all_that_a_command_can_be_asked_for(cli: Cli, command, folder):
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", cli(command, "--help").out).split())
    assert all(name in shown for name in plugins.command_names(folder))


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"], ["--version"]])
def test_help_does_not_import_torch(arguments):
    code = (
        "import sys\n"
        "from qtool.cli.app import app\n"
        "try:\n    app(sys.argv[1:])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "print('HEAVY', sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    assert "HEAVY []" in run_python(code, *arguments)


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_the_list_of_commands_imports_none_of_them(argument):
    code = (
        "import sys\n"
        "from qtool.cli.app import app\n"
        "try:\n    app(sys.argv[1:])\n"
        "except SystemExit:\n    pass\n"
        "print('OURS', sorted(name for name in sys.modules if name.startswith('qtool.')))\n"
        "print('SLOW', sorted({'importlib.abc', 'importlib.metadata'} & set(sys.modules)))\n"
    )
    printed = run_python(code, argument)
    ours = ["cli", "cli.app", "cli.interrupts", "cli.outcome", "errors", "integrations"]
    ours += ["integrations.transformers", "integrations.transformers.registration", "settings"]
    assert f"OURS {[f'qtool.{name}' for name in ours]}" in printed
    if argument == "--version":  # rich may do as it likes
        assert "SLOW []" in printed


def test_version_is_printed_alone(cli: Cli):
    done = cli("--version")
    assert (done.code, done.out.strip()) == (0, qtool.__version__)


def test_no_command_prints_help_as_a_usage_error(cli: Cli):
    done = cli()
    assert done.code == 2
    assert "Usage" in done.out + done.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["quantize"],
        ["quantize", "model"],
        ["quantize", "model", "out", "extra"],
        ["quantize", "--bits", "three", "model", "out"],
        ["quantize", "--no-such-option", "model", "out"],
        ["eval"],
        ["eval", "model", "--windows", "0"],
        ["eval", "model", "--context-length", "1"],
        ["bench", "model", "--perplexity-windows", "-1"],
        ["inspect"],
    ],
)
def test_usage_errors_exit_with_2_and_show_the_usage(cli: Cli, arguments):
    done = cli(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert "Usage" in done.err
    assert "Traceback" not in done.err


def test_running_the_module_is_running_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "qtool", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == qtool.__version__


@pytest.mark.parametrize("seed", [-1, MOST_SEED + 1])
def test_seeds_are_numbers_that_every_generator_takes(cli: Cli, seed):
    for command in COMMANDS:
        if any(option.name == "seed" for option in load_command(command).params):
            done = cli(command, f"--seed={seed}")
            assert done.code == 2
            assert "'--seed'" in done.err
