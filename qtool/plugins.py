"""Plug-ins are modules found by file name: `qtool/methods/rtn.py` is the method `rtn`.

No registry and no decorator: listing names imports nothing, loading one imports one module.
A module whose name starts with an underscore is no plug-in.
"""

import ast
import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import textwrap
from collections.abc import Sequence
from types import ModuleType
from typing import Any, TypeVar

from qtool import resources
from qtool.errors import UnknownNameError

Constant = TypeVar("Constant")
PluginOptions = Any  # a frozen dataclass of the plug-in's own
USES = {
    "qtool.methods": "a method: --method {0}",
    "qtool.folds": "a fold, which prepares weights for a method: --method rtn --set fold.name={0}",
    "qtool.exchange": "a format of other programs, which `qtool import` reads or export writes",
    "qtool.runtime.backends": "a backend, which runs what is quantized: --backend {0} of eval",
    "qtool.engines": "an engine, which shares work: --engine {0}",
    "qtool.formats": "a format, which methods write",
    "qtool.training.adapters": "a kind of adapter: qtool adapt OUT_DIR DATA DIR --method {0}",
    "qtool.training.recipes": "a way to train: qtool train OUT_DIR DATA DIR --recipe {0}",
}
"""Packages of plug-ins: what one of them is, and how a user gives it."""
LONGEST_SHOWN = 100
"""Characters of an unknown name in a message."""


def names(package: ModuleType) -> tuple[str, ...]:
    """Return the sorted names of the plug-ins in `package`, without importing them."""
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(name for name in found if not name.startswith("_")))


def load(package: ModuleType, name: str, constant: str, kind: type[Constant]) -> Constant:
    """Return the constant of the plug-in `name`.

    Args:
        package: The package that holds the plug-ins, such as `qtool.methods`.
        name: The plug-in's file name without `.py`.
        constant: The module-level name that it must define, such as `METHOD`.
        kind: The type that the constant must have.

    Raises:
        UnknownNameError: there is no such plug-in; the message suggests the nearest.
        TypeError: the module doesn't define the constant (a mistake of the plug-in's author).
    """
    path = f"{package.__name__}.{name}"
    # A manifest asks for its layers' codecs thousands of times: the folder is read once for each.
    if name.startswith("_") or path not in sys.modules:
        check_name(name, names(package), package.__name__.rsplit(".", 1)[-1])
    value = getattr(importlib.import_module(path), constant, None)
    if not isinstance(value, kind):
        raise TypeError(f"{package.__name__}.{name} must define {constant}: {kind.__name__}")
    return value


def command_names(package: ModuleType) -> tuple[str, ...]:
    """Return the sorted names of the plug-ins as the command line writes them, with hyphens."""
    return tuple(name.replace("_", "-") for name in names(package))


def load_named(
    package: ModuleType, name: str, constant: str, kind: type[Constant], where: str
) -> Constant:
    """Return the constant of the plug-in that the command line calls `name`; see `load`.

    `where` says what the plug-ins are, for a message.

    Raises:
        UnknownNameError: there is no such plug-in; the message suggests the nearest.
    """
    check_name(name, command_names(package), where)
    return load(package, name.replace("-", "_"), constant, kind)


def check_name(name: str, known: Sequence[str], where: str) -> None:
    """Raise UnknownNameError unless `where`, such as 'kernels', has something of that name."""
    if name not in known:
        raise UnknownNameError(describe_miss(name, known, where))


def describe_miss(name: str, known: Sequence[str], where: str) -> str:
    """Return the sentence for an unknown name: the nearest known one, then all of them."""
    shown = " ".join(name.split())[:LONGEST_SHOWN]
    near = difflib.get_close_matches(shown, known, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"No '{shown}' in {where}.{hint}{_elsewhere(shown)} Known: {', '.join(known)}."


def _elsewhere(name: str) -> str:
    """Return what the name means elsewhere and how it is given there, as sentences."""
    found = []
    for package, use in USES.items():
        spec = importlib.util.find_spec(package)
        folders = (spec and spec.submodule_search_locations) or ()
        if name.replace("-", "_") in {m.name for m in pkgutil.iter_modules(folders)}:
            found.append(use)
    if (resources.recipes_dir() / f"{name}.yaml").is_file():
        found.append("a built-in recipe: --recipe {0}")
    return f" {name} is {', and '.join(found).format(name)}." if found else ""


def attribute_docstrings(owner: type) -> dict[str, str]:
    """Return the strings that stand below the fields of a class, by name of the field.

    They are read from its source: of the options of a plug-in they are what a user is told.
    """
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    if not isinstance(definition, ast.ClassDef):
        raise TypeError(f"{owner} isn't defined by a class statement")
    found = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        ):
            found[field.target.id] = " ".join(text.value.value.split())
    return found
