"""`import qtool` is cheap, and registers whichever of the two is imported first."""

import pytest

from tests.helpers import run_python

LOADS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sorted({type(part).__name__ for part in model.modules() if 'Quant' in type(part).__name__}))
"""
KNOWS = """
from transformers.quantizers import auto
print('qtool' in auto.AUTO_QUANTIZATION_CONFIG_MAPPING, 'qtool' in auto.AUTO_QUANTIZER_MAPPING)
"""


def test_importing_qtool_alone_makes_checkpoints_load(checkpoint):
    assert run_python("import qtool" + LOADS, str(checkpoint)).strip() == "['QuantizedLinear']"


@pytest.mark.parametrize(
    "imports",
    ["import qtool; import transformers", "import transformers.quantizers.auto; import qtool"],
)
def test_transformers_knows_the_format_in_either_order_of_imports(imports):
    assert run_python(imports + KNOWS).strip() == "True True"


@pytest.mark.parametrize(
    "code", ["import qtool", "import qtool; qtool.WeightScheme", "from qtool import QtoolError"]
)
def test_importing_qtool_imports_neither_torch_nor_transformers(code):
    heavy = "; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert run_python(f"import sys; {code}{heavy}").strip() == "[]"


def test_registering_twice_leaves_one_hook():
    code = (
        "import sys; from qtool.integrations.transformers.registration import register, _Finder; "
        "register(); register(); print(sum(isinstance(f, _Finder) for f in sys.meta_path))"
    )
    assert run_python(code).strip() == "1"


def test_hook_leaves_other_imports_alone():
    code = "import qtool, json, email.mime.text, xml.dom; import no_such_module_of_anybody"
    with pytest.raises(AssertionError, match="No module named 'no_such_module_of_anybody'"):
        run_python(code)
