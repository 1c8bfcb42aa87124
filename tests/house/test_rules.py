"""Rules of the house that no linter knows. Each test lists what breaks its rule."""

import ast
import functools
import tomllib
from collections import defaultdict
from collections.abc import Iterable

import pytest

import qtool
from qtool import settings
from qtool.cli.doctor import EXTRAS
from tests.helpers import ROOT
from tests.house.source import MODULES, PLUGINS, Module, dotted, lines_of_code

PLUGIN_CONSTANTS = {
    *("METHOD", "CODEC", "BACKEND", "ADAPTER", "FOLD", "TRAINING", "EXCHANGE", "ENGINE", "PEERS"),
}
COMMANDS = {"cli", "pipeline"}
"""A command and what it calls have one name."""
MOST_FUNCTION_LINES, MOST_FILE_LINES, MOST_EVALUATION_LINES = 40, 300, 2000
JSON_WRITERS = {"qtool/storage/plain_json.py"}
APART = {"qtool/checkpoint/stream.py", "qtool/checkpoint/spool.py", "qtool/modeling/config.py"}
"""Headers of safetensors files, byte for byte; a configuration as transformers is to see it."""


def expect_none(found: Iterable[str]) -> None:
    """Fail with the list of all that breaks a rule."""
    lines = list(found)
    assert not lines, "\n".join(lines)


def outside(*folders: str) -> list[Module]:
    return [module for module in MODULES if module.folder not in folders]


def test_rules_see_the_source():
    assert len(MODULES) > 100
    assert {"rtn", "gptq", "bcq", "affine", "binary_coding", "cuda", "reference"} <= PLUGINS
    assert not {"llama", "_dtypes", "__init__"} & PLUGINS


def test_public_name_is_defined_once():
    found = defaultdict(list)
    for module in MODULES:
        for name in module.public_names():
            found[name].append(module)
    expect_none(
        f"{name}: {', '.join(map(str, modules))}"
        for name, modules in sorted(found.items())
        if len(modules) > 1
        and name not in PLUGIN_CONSTANTS
        # one command, one function that it calls
        and sorted(module.folder for module in modules) != sorted(COMMANDS)
    )


CALLED_FROM_OUTSIDE = {"QtoolQuantizer", "register_with_vllm", "answer_request"}
"""By transformers, by vLLM, and in the process that runs what a model wrote."""


def read_names(module: Module) -> Iterable[str]:
    """Return what a file reads: names, attributes, imports, and texts that name something."""
    for node in module.walk(ast.Name, ast.Attribute, ast.alias, ast.Constant):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.rpartition(".")[2]


def test_public_name_has_a_reader():
    """What only tests call is dead."""
    read = PLUGIN_CONSTANTS | CALLED_FROM_OUTSIDE
    read |= {name for module in MODULES for name in read_names(module)}
    expect_none(
        f"{module} {name}"
        for module in MODULES
        for name in module.public_names()
        if name not in read
    )


def test_no_public_name_is_a_subpackage():
    folders = {path.parent.name for path in (ROOT / "qtool").glob("*/__init__.py")}
    files = {path.stem for path in (ROOT / "qtool").glob("*.py")}
    assert set(qtool.__all__) & (folders | files) == set()


def texts(node: ast.AST) -> set[str]:
    """Return the texts that an operand of a comparison is, or holds as a literal."""
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return {text for one in node.elts for text in texts(one)}
    return {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()


def constants(module: Module) -> dict[str, set[str]]:
    """Return the texts of names that stand for nothing else, such as REFERENCE = "reference"."""
    found: dict[str, set[str]] = {}
    for node in module.tree.body:
        if isinstance(node, ast.Assign):
            pairs = [(node.targets[0], node.value)]
            if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(node.targets[0].elts, node.value.elts, strict=True))
            found |= {dotted(target): texts(value) for target, value in pairs}
    return found


EVERY_CONSTANT = {name: value for module in MODULES for name, value in constants(module).items()}


def names_plugin(node: ast.AST) -> bool:
    known = EVERY_CONSTANT.get(dotted(node).rpartition(".")[2], set()) | texts(node)
    return bool(known & PLUGINS)


def is_device(node: ast.AST) -> bool:
    """Return whether an operand is the type of a device, which `cuda` and `cpu` are too."""
    return dotted(node).endswith((".type", "device"))


def is_tag(node: ast.AST, module: Module) -> bool:
    """Return whether an operand is the tag of stored data, where these are read or executed."""
    return dotted(node).endswith(".format") and module.folder in ("formats", "runtime", "exchange")


def test_no_plugin_is_compared_by_name():
    """A plug-in is asked what it can do; it isn't known by what it is called."""
    found = []
    for module in MODULES:
        for node in module.walk(ast.Compare):
            operands = [node.left, *node.comparators]
            excused = any(is_device(one) or is_tag(one, module) for one in operands)
            if any(map(names_plugin, operands)) and not excused:
                found.append(f"{module.place(node)} {ast.unparse(node)}")
        cases = (node for node in module.walk(ast.MatchValue) if names_plugin(node.value))
        found += [f"{module.place(node)} case {ast.unparse(node)}" for node in cases]
    expect_none(found)


def test_cuda_names_devices_only():
    """The backend of that name says it of itself, in its own file."""
    found = []
    for module in MODULES:
        above = module.parents
        for node in module.walk(ast.Constant):
            if node.value != "cuda" or "backends" in module.path.parts:
                continue
            parent = above[node]
            while isinstance(parent, ast.IfExp | ast.BoolOp | ast.Tuple):
                parent = above[parent]
            device = isinstance(parent, ast.Call) and dotted(parent.func).endswith(
                (".device", ".startswith")
            )
            compared = isinstance(parent, ast.Compare) and is_device(parent.left)
            named = isinstance(parent, ast.Assign) and dotted(parent.targets[0]).endswith("_ON")
            if not device and not named and not compared and not isinstance(parent, ast.Dict):
                found.append(f"{module.place(node)} {ast.unparse(parent)}")
    expect_none(found)


def test_json_is_written_by_one_function():
    """`indent` makes a file for people, `write` any file: NaN and half a file are for none."""
    found = []
    for module in outside("sandbox"):
        if str(module) in JSON_WRITERS | APART or "sandbox" in module.path.name:
            continue
        above = module.parents
        for node in module.walk(ast.Call):
            name = dotted(node.func)
            if name not in ("json.dump", "json.dumps"):
                continue
            calls, parent = [], above[node]
            while isinstance(parent, ast.expr | ast.keyword):
                calls.append(dotted(parent.func) if isinstance(parent, ast.Call) else "")
                parent = above[parent]
            written = any(call.rpartition(".")[2].startswith("write") for call in calls)
            if written or name == "json.dump" or any(k.arg == "indent" for k in node.keywords):
                found.append(module.place(node))
    expect_none(found)


def test_environment_is_read_in_settings_alone():
    found = []
    for module in MODULES:
        above = module.parents
        for node in module.walk(ast.Attribute, ast.Name):
            name = dotted(node)
            sets = dotted(above.get(node, node)).endswith("environ.update")  # a child's own
            if name in ("os.environ", "os.getenv", "environ", "getenv") and not sets:
                found.append(module.place(node))
    expect_none(place for place in found if not place.startswith("qtool/settings.py"))
    assert found, "settings.py reads it by other means than this test knows"


def test_every_setting_is_in_the_list_that_doctor_prints():
    named = {
        str(node.value)
        for module in MODULES
        for node in module.walk(ast.Constant)
        if str(node.value).startswith("QTOOL_") and str(node.value).isupper()
    }
    assert named == set(settings.VARIABLES)
    assert set(settings.EXECUTION) < named


def test_functions_fit_a_screen():
    found = [
        f"{module.place(node)} {node.name}: {lines_of_code(module, node)} lines"
        for module in outside("cli")
        for node in module.walk(ast.FunctionDef)
        if lines_of_code(module, node) > MOST_FUNCTION_LINES
    ]
    expect_none(found)


def test_files_are_read_in_one_go():
    expect_none(
        f"{module}: {len(module.lines)} lines"
        for module in MODULES
        if len(module.lines) > MOST_FILE_LINES
    )


def test_evaluation_is_not_the_largest_room():
    lines = sum(len(module.lines) for module in MODULES if module.folder == "evaluation")
    assert lines < MOST_EVALUATION_LINES


@functools.cache
def imported() -> set[str]:
    found = set()
    for module in MODULES:
        for node in module.walk(ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        for source in module.walk(ast.ImportFrom):
            found.add((source.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("extra", EXTRAS)
def test_extra_brings_what_code_imports(extra):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert extra in project["optional-dependencies"]
    by_transformers = {"gguf"}  # which reads GGUF files with it
    assert EXTRAS[extra] in imported() | by_transformers


def test_errors_are_raised():
    """A class of errors that nothing raises is a promise that nothing keeps."""
    tree = ast.parse((ROOT / "qtool/errors.py").read_text(encoding="utf-8"))
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    made = {dotted(node.func) for module in MODULES for node in module.walk(ast.Call)}
    assert classes - {name.rpartition(".")[2] for name in made} - {"QtoolError"} == set()
