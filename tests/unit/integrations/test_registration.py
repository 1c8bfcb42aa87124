"""`import qtool` is cheap, and registers whichever of the two is imported first; torch calls it."""

from importlib import metadata

import pytest

from tests.helpers import ROOT, run_python

LOADS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sorted({type(part).__name__ for part in model.modules() if 'Quant' in type(part).__name__}))
"""
KNOWS = """
import sys, transformers.modeling_utils
from transformers.quantizers import auto
print('qtool' in auto.AUTO_QUANTIZATION_CONFIG_MAPPING, 'qtool.base' in sys.modules)
"""
NOT_BY_TORCH = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
TIME = """
import logging, pathlib, sys, time
from importlib import import_module, metadata, util
costs = []
for _ in range(5):
    for name in [name for name in sys.modules if name.startswith('qtool')]:
        del sys.modules[name]
    before, start = set(sys.modules), time.thread_time()
    import_module('qtool_autoload').register()
    costs.append(time.thread_time() - start)
print(min(costs), *sorted(set(sys.modules) - before))
"""


def test_importing_qtool_alone_makes_checkpoints_load(checkpoint):
    found = run_python("import qtool" + LOADS, str(checkpoint), environment=NOT_BY_TORCH)
    assert found.strip() == "['QuantizedLinear']"


def test_qtool_may_be_imported_after_transformers():
    code = f"import transformers.quantizers.auto; import qtool{KNOWS}"
    assert run_python(code, environment=NOT_BY_TORCH).strip() == "True False"


def test_torch_calls_us_amid_the_import_of_the_table_and_it_is_filled_all_the_same():
    code = f"from transformers.quantizers import auto{KNOWS}"
    assert run_python(code, cwd=ROOT.parent).strip() == "True False"


def test_torch_can_be_told_not_to_call_us():
    code = "import sys, torch; print('qtool' in sys.modules)"
    assert run_python(code, cwd=ROOT.parent).strip() == "True"
    assert run_python(code, environment=NOT_BY_TORCH, cwd=ROOT.parent).strip() == "False"


def test_metadata_name_what_torch_calls():
    (found,) = metadata.entry_points(group="torch.backends", name="qtool")
    assert found.value == "qtool_autoload:register", "make setup"


def test_what_torch_calls_takes_five_milliseconds_at_most_and_imports_nothing_else(tmp_path):
    environment = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    seconds, *imported = run_python(TIME, environment=environment).split()
    assert float(seconds) < 5e-3
    assert imported == [
        *("qtool", "qtool.integrations", "qtool.integrations.transformers"),
        *("qtool.integrations.transformers.registration", "qtool_autoload"),
    ]


@pytest.mark.parametrize("found", ["qtool.py", "qtool/__init__.py"])
def test_another_package_of_that_name_is_left_alone(found, tmp_path):
    (tmp_path / found).parent.mkdir(exist_ok=True)
    (tmp_path / found).write_text("raise SystemExit('run by import torch')")
    code = "import sys, torch; print(sorted(n for n in sys.modules if n.startswith('qtool.')))"
    assert run_python(code, environment={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path).strip() == "[]"


def test_torch_is_imported_even_if_ours_fails(tmp_path):
    hook = tmp_path / "qtool" / "integrations" / "transformers" / "registration.py"
    hook.parent.mkdir(parents=True)
    hook.write_text("")
    (tmp_path / "qtool" / "__init__.py").write_text("raise RuntimeError('half of it is missing')")
    code = "import torch; print(torch.ones(1).item())"
    environment = {"PYTHONPATH": str(tmp_path)}
    assert run_python(code, environment=environment, cwd=tmp_path).strip() == "1.0"


def test_checkpoint_is_refused_where_its_quantizer_cannot_be_imported(checkpoint):
    code = """
import sys
from transformers import AutoModelForCausalLM
sys.modules['qtool.integrations.transformers.install'] = None
for attempt in range(2):  # the second must not find a table without the format
    try:
        AutoModelForCausalLM.from_pretrained(sys.argv[1])
    except ImportError as error:
        print(type(error).__name__)
"""
    assert run_python(code, str(checkpoint)).split() == ["ModuleNotFoundError"] * 2


@pytest.mark.parametrize(
    "code", ["import qtool", "import qtool; qtool.WeightScheme", "from qtool import QtoolError"]
)
def test_importing_qtool_imports_neither_torch_nor_transformers(code):
    heavy = "; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert run_python(f"import sys; {code}{heavy}").strip() == "[]"


def test_registering_twice_leaves_one_hook():
    code = (
        "import sys; from qtool.integrations.transformers.registration import register, _Finder; "
        "register(); register(); import torch; "
        "print(sum(isinstance(finder, _Finder) for finder in sys.meta_path))"
    )
    assert run_python(code).strip() == "1"


def test_hook_leaves_other_imports_alone():
    code = "import qtool, json, email.mime.text, xml.dom; import no_such_module_of_anybody"
    with pytest.raises(AssertionError, match="No module named 'no_such_module_of_anybody'"):
        run_python(code)
