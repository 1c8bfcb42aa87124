"""Every causal language model that transformers has: quantized, loaded, run, saved again.

What is refused, and why, is recorded by `python -m tests.every_family`, for the table in docs.
"""

import shutil

import pytest

from tests import every_family, tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # of models that nobody uses any more
pytest.importorskip("transformers", minversion="5.0")

RECORDED = every_family.recorded()
WORKING = [name for name, found in RECORDED.items() if "share" in found]
CALIBRATED = [name for name in WORKING if "without calibration" not in RECORDED[name]]
MEANT = (
    *("bloom", "gemma3", "gpt2", "gptj", "llama", "opt", "openai-gpt"),
    *("deepseek_v3", "mixtral", "bamba", "lfm2", "qwen3_next"),
)
"""Calibrated whenever tests run; the others take minutes."""


@pytest.fixture
def place(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_every_family_of_the_installed_transformers_was_tried():
    assert tuple(RECORDED) == tiny.families()
    assert len(WORKING) >= 150


@pytest.mark.parametrize("family", WORKING)
def test_data_free_in_4_bits(family, place):
    every_family.check(family, "rtn", place)


def few(family: str):
    return pytest.param(family, marks=[] if family in MEANT else pytest.mark.slow)


@pytest.mark.parametrize("method", ["gptq", "bcq"])
@pytest.mark.parametrize("family", [few(name) for name in CALIBRATED])
def test_calibrated_in_3_bits(family, method, place):
    every_family.check(family, method, place)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("family", tiny.MULTIMODAL)
def test_whole_multimodal_models_answer_on_text(family, method, place):
    every_family.check(family, method, place)


@pytest.mark.parametrize("family", [name for name in RECORDED if "refused" in RECORDED[name]])
def test_a_refusal_has_the_reason_that_is_recorded(family, place):
    assert every_family.why_not(family, "rtn", place) == RECORDED[family]["refused"]
