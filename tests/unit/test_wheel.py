"""The wheel holds recipes, kernels and texts, and finds them without the repository."""

import subprocess
import sys
import zipfile

import pytest

from qtool.core.native import building
from qtool.recipe.names import built_in, in_folders
from tests.helpers import ROOT, run_python

pytestmark = pytest.mark.wheel

LOADS = """
import sys
sys.path.insert(0, sys.argv[1])
import qtool
from qtool import resources
from qtool.recipe.load import load_recipe
from qtool.recipe.names import built_in
assert qtool.__file__.startswith(sys.argv[1]), qtool.__file__
assert resources.recipes_dir().name == "_recipes"
assert resources.kernels_dir().name == "_kernels"
assert resources.texts_dir().is_dir()
for name in built_in():
    load_recipe(name)
print(" ".join(built_in()))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel without a network and return its path."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_what_the_repository_has_outside_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    recipes = {name for name in names if name.startswith("qtool/_recipes/")}
    assert {f"qtool/_recipes/{name}.yaml" for name in (*built_in(), *in_folders())} <= recipes
    assert [name for name in names if name.startswith("qtool/_kernels/")]
    assert [name for name in names if name.endswith("wikitext2-test.txt.xz")]
    assert [name for name in names if name.endswith("dialogues.jsonl.xz")]
    assert [name for name in names if name.endswith("LICENSE-texts.md")]


@pytest.mark.skipif(building.compiler() is None, reason="there is no C compiler")
def test_wheel_has_a_library_for_each_level_and_names_its_platform(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for level in building.instruction_levels():
        assert f"qtool/_native/{building.file_name(ROOT / 'kernels' / 'cpu', level)}" in names
    assert wheel.stem.split("-")[-3:-1] == ["py3", "none"] and not wheel.stem.endswith("any")


def test_wheel_holds_nothing_of_tests_caches_or_this_machine(wheel):
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            assert name.startswith(("qtool/", "qtool_autoload.py", "qtool_llm-"))
            assert "__pycache__" not in name
            if not name.endswith(".xz"):
                assert str(ROOT).encode() not in archive.read(name)


def test_torch_finds_the_unpacked_wheel(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import sys, torch; print(sys.modules['qtool'].__file__)"
    printed = run_python(code, cwd=tmp_path, environment={"PYTHONPATH": str(tmp_path)})
    assert printed.startswith(str(tmp_path))


def test_recipes_load_from_the_unpacked_wheel(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    printed = run_python(LOADS, str(tmp_path), cwd=tmp_path)
    assert tuple(printed.split()) == built_in()
