"""The pages on adding something are followed to the letter, and what they make is tested.

A file goes into a temporary folder that its package looks into as well; then the contract tests
that the page names run on it in a process of their own, as they find plug-ins when they start.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

import qtool.methods
from qtool import resources
from qtool.recipe.names import built_in
from qtool.steps.plan import load_method
from tests.docs.pages import blocks, made_files
from tests.helpers import ROOT, run_python
from tests.recipes import test_recipes as recipes

TEST_COMMAND = re.compile(r"^\.venv/bin/python -m pytest -q (.+)$", re.MULTILINE)
LESS = {"backend": ["-k", "exact and (rows or leading or fused or prepared or decoding or name)"]}
"""For time's sake: the last -k counts."""
CONTRACT = """
import importlib, sys, pytest
package, folder, oracle, *arguments = sys.argv[1:]
importlib.import_module(package).__path__.append(folder)
if oracle:
    import tests.golden.oracles
    exec(oracle, vars(tests.golden.oracles))
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *arguments]))
"""


@dataclass(frozen=True)
class Page:
    """A page of docs/ on adding something."""

    name: str

    @property
    def path(self) -> Path:
        return ROOT / "docs" / f"adding-a-{self.name}.md"

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def file(self) -> Path:
        """Return where the page puts its file."""
        (file,) = made_files(self.path)
        assert not (ROOT / file).exists(), "the example is part of the product by now"
        return file

    @property
    def arguments(self) -> list[str]:
        """Return what the page gives pytest."""
        (command,) = TEST_COMMAND.findall(self.text)
        return shlex.split(command)


def test_every_page_is_followed():
    pages = {path.stem.removeprefix("adding-a-") for path in ROOT.glob("docs/adding-a-*.md")}
    assert pages == {"method", "format", "backend", "model", "recipe"}


@pytest.mark.parametrize("name", ["method", "format", "backend", "model"])
def test_plugin_of_the_page_passes_its_contract_test(name, tmp_path):
    page = Page(name)
    plugin, *others = blocks(page.path, "python")
    (tmp_path / page.file.name).write_text(plugin, encoding="utf-8")
    package = ".".join(page.file.parent.parts)
    oracle = next((text for text in others if "ORACLES" in text), "")
    printed = run_python(
        CONTRACT, package, str(tmp_path), oracle, *page.arguments, *LESS.get(name, [])
    )
    passed = re.search(r"(\d+) passed", printed)
    assert passed is not None, printed
    assert int(passed[1]) >= 5, printed
    assert "failed" not in printed


def test_method_of_the_page_does_what_the_page_says(tmp_path, monkeypatch, capsys):
    page = Page("method")
    method, trial = blocks(page.path, "python")
    (tmp_path / page.file.name).write_text(method, encoding="utf-8")
    monkeypatch.setattr(qtool.methods, "__path__", [*qtool.methods.__path__, str(tmp_path)])
    exec(compile(trial, str(page.path), "exec"), {})
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    for name, error in printed.items():
        assert f"{float(error):.3f} for `{name}`" in page.text
    assert load_method(page.file.stem).num_bits == range(1, 9)


def test_recipe_of_the_page_passes_the_tests_of_recipes(tmp_path, monkeypatch, tiny):
    page = Page("recipe")
    (text,) = blocks(page.path, "yaml")
    (tmp_path / page.file.name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(resources, "recipes_dir", lambda: tmp_path)
    assert built_in() == (page.file.stem,)
    assert page.arguments == ["tests/recipes", "-k", page.file.stem]
    recipes.test_file_is_a_mapping_with_a_version_and_a_description(tmp_path / page.file.name)
    recipes.test_recipe_plans_on_a_tiny_model(page.file.stem, tiny)
    recipes.test_name_tells_method_width_and_group(page.file.stem)
