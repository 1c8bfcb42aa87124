import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import qtool
from qtool import plugins, resources
from qtool.errors import RecipeError, SchemeError, UnknownNameError
from qtool.modeling.locate import Location
from qtool.recipe.names import find_recipe
from qtool.scheme import GROUP_DIMS, Shape2D, WeightScheme
from qtool.steps.method_choice import load_method
from tests.helpers import ROOT, recipe, run_python


def test_every_public_name_exists_and_is_sorted():
    names = [name for name in qtool.__all__ if name != "__version__"]
    assert names == sorted(names)
    for name in qtool.__all__:
        assert getattr(qtool, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = qtool.quantise


def test_models_have_names_in_python_as_on_the_command_line(llama, checkpoint, tmp_path):
    result = qtool.quantize(str(llama), tmp_path / "out", recipe())
    assert result.out_dir == tmp_path / "out"
    for model in (str(tmp_path / "out"), Location(tmp_path / "out")):
        assert qtool.load_model(model).name == "out"
    with pytest.raises(qtool.QtoolError, match="No model directory"):
        qtool.evaluate(str(checkpoint), None, baseline="./nowhere")


def test_version_is_that_of_the_metadata():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert qtool.__version__ == project["version"]


@pytest.mark.parametrize("package", ["qtool.methods", "qtool.formats", "qtool.modeling.families"])
def test_listing_plugins_imports_none(package):
    code = (
        f"import sys, {package}; from qtool import plugins;"
        f"names = plugins.names({package});"
        f"print(len(names), [n for n in names if '{package}.' + n in sys.modules])"
    )
    count, imported = run_python(code).split(maxsplit=1)
    assert int(count) > 0
    assert imported.strip() == "[]"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a package with three plug-ins, one of them private, one without its constant."""
    folder = tmp_path / "own_plugins"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "good.py").write_text("NUMBER = 3")
    (folder / "empty.py").write_text("")
    (folder / "_hidden.py").write_text("NUMBER = 4")
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module("own_plugins")


def test_plugins_are_found_by_file_name(package):
    assert plugins.names(package) == ("empty", "good")
    assert plugins.load(package, "good", "NUMBER", int) == 3


def test_plugin_without_its_constant_is_the_mistake_of_its_author(package):
    for name, kind in (("empty", int), ("good", str)):
        with pytest.raises(TypeError, match=f"own_plugins.{name} must define NUMBER"):
            plugins.load(package, name, "NUMBER", kind)


def test_miss_suggests_the_nearest_and_lists_all(package):
    expected = r"No 'goood' in own_plugins\. Did you mean 'good'\? Known: empty, good\."
    with pytest.raises(UnknownNameError, match=expected):
        plugins.load(package, "goood", "NUMBER", int)
    with pytest.raises(UnknownNameError, match=r"No '_hidden' in own_plugins\. Known"):
        plugins.load(package, "_hidden", "NUMBER", int)


@pytest.mark.parametrize("package", plugins.USES)
def test_a_name_of_another_kind_is_said_to_be_that(package, monkeypatch):
    found = plugins.names(importlib.import_module(package))
    assert found
    for name in found:
        said = plugins.describe_miss(name.replace("_", "-"), (), "nothing")
        assert plugins.USES[package].format(name.replace("_", "-")) in said
    monkeypatch.setattr(plugins, "USES", {})
    assert "is a" not in plugins.describe_miss(found[0], (), "nothing")


def test_a_fold_in_the_place_of_a_method_says_how_it_is_given():
    with pytest.raises(
        UnknownNameError, match=r"awq is a fold, .*--method rtn --set fold.name=awq"
    ):
        load_method("awq")
    with pytest.raises(RecipeError, match=r"rtn is a method: --method rtn\."):
        find_recipe("rtn")
    with pytest.raises(UnknownNameError, match=r"a built-in recipe: --recipe rtn-w4g128"):
        load_method("rtn-w4g128")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_bits": 0}, "num_bits is 0; allowed are 1 to 8"),
        ({"num_bits": 9}, "num_bits is 9"),
        ({"num_bits": 4, "group_size": 0}, "group_size is 0; allowed are 1 and more"),
        ({"num_bits": 4, "group_dim": "rows"}, "allowed are in_features and out_features"),
    ],
)
def test_impossible_scheme_is_refused(changes, message):
    with pytest.raises(SchemeError, match=message):
        WeightScheme(**changes)


def test_scheme_is_hashable_and_frozen():
    scheme = WeightScheme(num_bits=4)
    assert len({scheme, WeightScheme(num_bits=4), WeightScheme(num_bits=3)}) == 2
    with pytest.raises(AttributeError):
        scheme.num_bits = 3  # type: ignore[misc]


@pytest.mark.parametrize("group_dim", GROUP_DIMS)
@pytest.mark.parametrize(("group_size", "groups"), [(None, 1), (1, 10), (4, 3), (10, 1), (99, 1)])
def test_last_group_may_be_short(group_dim, group_size, groups):
    shape = Shape2D(10, 7) if group_dim == "out_features" else Shape2D(7, 10)
    scheme = WeightScheme(num_bits=4, group_size=group_size, group_dim=group_dim)
    assert (scheme.num_groups(shape), scheme.num_rows(shape)) == (groups, 7)


def test_shipped_folders_are_there():
    assert list(resources.recipes_dir().glob("*.yaml"))
    assert list(resources.texts_dir().glob("*.xz"))
    assert resources.kernels_dir().name in ("kernels", "_kernels")


MODULES = [module.name for module in pkgutil.walk_packages(qtool.__path__, "qtool.")]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_module_has_a_docstring_and_no_print_outside_the_terminal(name):
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    if not name.startswith("qtool.cli"):
        called = {call.func.id for call in ast.walk(tree) if is_plain_call(call)}  # type: ignore[attr-defined]
        assert "print" not in called


def is_plain_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
