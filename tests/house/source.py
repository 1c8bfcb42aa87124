"""The source of qtool, taken apart for the rules of the house."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from tests.helpers import ROOT

PLUGIN_FOLDERS = ("methods", "formats", "backends", "folds", "exchange", "engines")
"""Whose file names are names of plug-ins; families are named by the models' own files."""


Node = TypeVar("Node", bound=ast.AST)


@dataclass(frozen=True)
class Module:
    """One file of qtool."""

    path: Path

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def folder(self) -> str:
        """Return the package right below qtool; empty for a file of its root."""
        parts = self.path.relative_to(ROOT / "qtool").parts
        return parts[0] if len(parts) > 1 else ""

    @cached_property
    def lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"))

    def place(self, node: ast.AST) -> str:
        return f"{self}:{getattr(node, 'lineno', 1)}"

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @cached_property
    def parents(self) -> dict[ast.AST, ast.AST]:
        return {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}

    def walk(self, *kinds: type[Node]) -> Iterator[Node]:
        return (node for node in self.nodes if isinstance(node, kinds))

    def public_names(self) -> list[str]:
        """Return what it defines at its top level, without what is private."""
        found: list[str] = []
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                found.append(node.name)
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
            names = (name for target in targets for name in ast.walk(target))
            found += [name.id for name in names if isinstance(name, ast.Name)]
        return [name for name in dict.fromkeys(found) if not name.startswith("_")]


MODULES = [Module(path) for path in sorted((ROOT / "qtool").rglob("*.py"))]
PLUGINS = {
    module.path.stem
    for module in MODULES
    if module.path.parent.name in PLUGIN_FOLDERS and not module.path.stem.startswith("_")
} | {
    path.parent.name
    for path in (ROOT / "qtool").rglob("__init__.py")
    if path.parent.parent.name in PLUGIN_FOLDERS
}


def dotted(node: ast.AST) -> str:
    """Return an expression of names and dots as it is written; '' for any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else f".{node.attr}"
    return ""


def lines_of_code(module: Module, function: ast.AST) -> int:
    """Return the lines of a function without its docstring, comments and empty lines."""
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    first = function.body[0]
    has_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    text = range(first.lineno, (first.end_lineno or first.lineno) + 1) if has_text else range(0)
    whole = range(function.lineno, (function.end_lineno or function.lineno) + 1)
    kept = (module.lines[number - 1].strip() for number in whole if number not in text)
    return sum(bool(line) and not line.startswith("#") for line in kept)
