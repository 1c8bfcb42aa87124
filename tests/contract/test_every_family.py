"""Every causal language model that transformers has: quantized, loaded, run, saved again.

`docs/families.py` writes what comes out here into a table: what is refused, and why.
"""

import shutil
from pathlib import Path

import pytest
import torch

from tests import every_family, tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of models that nobody uses any more
    pytest.mark.skipif(not every_family.IS_NEWEST, reason="the table is transformers 5's"),
]
CALIBRATED = (
    *("bloom", "gemma3", "gpt2", "gptj", "llama", "opt"),
    *("deepseek_v3", "gpt_oss", "mixtral", "qwen3_moe"),
    *("bamba", "falcon_h1", "lfm2", "qwen3_next"),
)
WORKING = tuple(f for f in tiny.families() if f not in every_family.REFUSED)


@pytest.fixture
def place(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("family", WORKING)
def test_data_free_in_4_bits(family, place):
    every_family.check(family, "rtn", place)


@pytest.mark.parametrize("family", [*CALIBRATED, *(
    pytest.param(family, marks=pytest.mark.slow)
    for family in WORKING if family not in CALIBRATED
)])
@pytest.mark.parametrize("method", ["gptq", "bcq"])
def test_calibrated_in_3_bits(family, method, place):
    if family in every_family.WITHOUT_CALIBRATION:
        pytest.skip(every_family.WITHOUT_CALIBRATION[family])
    every_family.check(family, method, place)


@pytest.mark.parametrize("family", every_family.REFUSED)
def test_what_is_refused_is_refused_for_the_reason_in_the_table(family, place):
    assert every_family.why_not(family, place) is not None


def test_enough_families_work_and_none_is_forgotten():
    assert len(WORKING) >= 150
    assert {*every_family.REFUSED, *every_family.WITHOUT_CALIBRATION} <= {*tiny.families()}
