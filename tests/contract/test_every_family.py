"""Every causal language model that transformers has: quantized, loaded, run, saved again.

What is refused, and why, is recorded by `python -m tests.every_family`, for the table in docs.
"""

import pickle
import shutil

import pytest
import torch

from qtool import pipeline
from qtool.errors import CheckpointError, RecipeError
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source
from qtool.recipe.load import recipe_from_mapping
from qtool.steps import plan as planning
from tests import every_family, tiny
from tests.stored import stored_weights

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


OF_TABLES = ("bert", "big_bird", "data2vec-text", "falcon_mamba", "llama", "llama4_text", "mamba")


@pytest.mark.parametrize("family", OF_TABLES)
def test_with_quantized_tables_that_its_code_asks_or_the_head_shares(family, place):
    source = every_family.save(family, place / "source")
    scheme = {"method": "rtn", "scheme": {"num_bits": 4, "group_size": 32}}
    tables = ("embedding",) if open_source(Location(source)).head_is_tied else ("embedding", "head")
    wanted = recipe_from_mapping({"weights": scheme, **dict.fromkeys(tables, scheme)})
    pipeline.quantize(Location(source), place / "out", wanted)
    original, quantized = every_family.load(source), every_family.load(place / "out")
    every_family.put(original, stored_weights(place / "out"))
    said = every_family.logits(quantized)
    torch.testing.assert_close(said, every_family.logits(original), rtol=1e-4, atol=1e-5)
    quantized.save_pretrained(place / "again")
    for again in (every_family.load(place / "again"), pickle.loads(pickle.dumps(quantized))):
        torch.testing.assert_close(every_family.logits(again), said, rtol=1e-5, atol=1e-6)


def test_an_embedding_that_does_more_than_look_up_rows_is_not_quantized(place, monkeypatch):
    source = every_family.save("inkling_text", place / "source")
    scheme = {"method": "rtn", "scheme": {"num_bits": 4, "group_size": 32}}
    wanted = recipe_from_mapping({"weights": scheme, "embedding": scheme})
    with pytest.raises(RecipeError, match="NormedEmbedding does more than look up its rows"):
        pipeline.quantize(Location(source), place / "out", wanted)
    monkeypatch.setattr(planning, "_check_table", lambda _: None)  # as versions before wrote it
    pipeline.quantize(Location(source), place / "out", wanted)
    with pytest.raises(CheckpointError, match="NormedEmbedding does more than look up its rows"):
        every_family.load(place / "out")


@pytest.mark.parametrize("family", ["gemma4", "prophetnet"])
def test_an_embedding_whose_rows_something_else_reads_is_not_quantized(family, place):
    source = every_family.save(family, place / "source")
    scheme = {"method": "rtn", "scheme": {"num_bits": 4, "group_size": 32}}
    with pytest.raises(RecipeError, match=r"reads its rows\. Leave out the section"):
        pipeline.quantize(
            Location(source),
            place / "out",
            recipe_from_mapping({"weights": scheme, "embedding": scheme}),
        )


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
