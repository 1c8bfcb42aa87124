from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from qtool import pipeline, resources
from qtool.checkpoint.manifest import LayerEntry, Manifest
from qtool.data.corpora import bundled
from qtool.data.licences import TEXT_LICENCES, text_licence
from qtool.evaluation.scores import Score
from qtool.modeling.locate import Location
from qtool.recipe.load import load_recipe
from qtool.report.card import Provenance, TextUse, model_card
from qtool.report.measured import CloseRecord, Measured, PairedRecord, TaskRecord, TextRecord
from qtool.report.measured_text import NOT_MEASURED, measured_section, with_measured
from qtool.scheme import Shape2D, WeightScheme
from tests.helpers import recipe

MANIFEST = Manifest(
    tool_version="0.1.0", recipe={"weights": {"method": "rtn"}}, layers={}, source=None
)


def front(card: str) -> dict[str, Any]:
    begin, text, _ = card.split("---\n", 2)
    assert begin == ""
    return yaml.safe_load(text)


def test_card_of_a_run_says_what_it_is_made_of(llama, tmp_path):
    section = {"dataset": "wikitext2-valid", "num_samples": 4, "sequence_length": 16}
    calibrated = recipe("gptq", calibration=section)
    pipeline.quantize(Location(llama), tmp_path / "out", calibrated)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert front(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["qtool", "quantized", "gptq", "4-bit"],
    }
    assert "gptq" in card
    assert "| calibration data | wikitext2-valid: 4 samples, 64 tokens |" in card
    assert "| original | a local model |" in card
    assert "with embedding and head" in card
    assert "mean error added to the outputs" in card
    assert str(llama) not in card
    assert llama.name not in card


def test_card_names_a_public_original_and_its_licence():
    about = Provenance(licence={"license": "other", "license_name": "own: terms"})
    card = model_card(MANIFEST, "someone/model", about)
    assert front(card)["base_model"] == "someone/model"
    assert front(card)["license_name"] == "own: terms"
    assert "| calibration data | none |" in card


def test_demo_model_is_named_as_the_hub_names_it():
    found = front(model_card(MANIFEST, "demo:smollm2"))
    assert found["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert found["license"] == "apache-2.0"


@pytest.mark.parametrize("source", ["a: b", "- x", "'", "someone/[m]", "y\n---\nz"])
def test_front_matter_stays_valid(source):
    card = model_card(MANIFEST, source)
    text = card.removeprefix("---\n").split("\ntags:")[0]
    assert yaml.safe_load(text)["base_model"] == source


SCHEME = WeightScheme(num_bits=3, group_size=64)
ENTRY = LayerEntry(format="affine", scheme=SCHEME, shape=Shape2D(64, 128), method="gptq")
SCORE = Score(
    task="arc_easy",
    metric="acc",
    filter="none",
    value=0.5,
    standard_error=0.1,
    higher_is_better=True,
    num_items=26,
    shots=0,
    version="1.0",
    kind="mean",
)
MEASURED = Measured(
    texts=TextRecord(
        conditions="wikitext2-test, first 8 of 147 windows of 2048 tokens, float32 on cpu",
        perplexity=23.4567,
        original=21.0,
        closeness=(
            CloseRecord(
                dataset="wikitext2-test",
                positions=2048,
                context_length=2048,
                kl=0.1234,
                kl_error=0.0056,
                kl_p99=0.9,
                same_token=0.8,
                same_token_error=0.009,
            ),
        ),
    ),
    tasks={
        "arc_easy": TaskRecord(
            conditions="first 26 items, float32 on cpu, batch size auto; lm-eval 0.4.13",
            scores=(SCORE,),
            paired=(
                PairedRecord(
                    task="arc_easy",
                    metric="acc",
                    original=0.5,
                    value=0.5,
                    difference=0.0,
                    error=0.05,
                    p_value=1.0,
                    verdict="no difference shown",
                ),
            ),
        )
    },
    table="|Tasks|Version|\n|-----|------:|",
)
GOLDEN = Path(__file__).with_name("card.md")


def whole_card() -> str:
    recipe = {
        "version": 1,
        "weights": {
            "method": "gptq",
            "scheme": {"num_bits": 3, "group_size": 64},
            "options": {"damping": 0.01},
        },
    }
    manifest = Manifest(tool_version="0.1.0", recipe=recipe, layers={"a": ENTRY}, source=None)
    about = Provenance(
        licence={"license": "other", "license_name": "own", "license_link": "LICENSE"},
        texts=(
            TextUse(name="prose", licence="public domain", samples=60, tokens=61440),
            TextUse(name="a|b.jsonl", licence="a file", samples=None, tokens=None),
        ),
        calibration="a mixture of prose, a|b.jsonl: 64 samples, 65536 tokens",
        samples_given=True,
        missing_tokens=("<tool>",),
        weight_bytes=4_000_000,
        source_bytes=16_000_000,
        num_weights=8_000_000,
        fallbacks=2,
        errors={"error of the weights (NMSE)": 0.0123},
        measured=MEASURED,
    )
    return model_card(manifest, "someone/model", about)


def test_card_has_the_recorded_text():
    """`python -m tests.unit.report.test_card` records it anew."""
    assert whole_card() == GOLDEN.read_text(encoding="utf-8")


def test_hub_reads_the_card():
    card = ModelCard(whole_card())
    assert card.data.base_model == "someone/model"
    assert card.data.license == "other"
    assert card.data.tags == ["qtool", "quantized", "gptq", "3-bit"]
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert card.text.lstrip().startswith("# someone/model, quantized")


def test_section_takes_the_place_of_the_one_before():
    before = model_card(MANIFEST, "someone/model")
    assert NOT_MEASURED in before
    after = with_measured(before, MEASURED)
    assert measured_section(MEASURED) in after
    assert NOT_MEASURED not in after
    assert with_measured(after, Measured()) == before
    assert with_measured("# Someone's own page\n", MEASURED) == "# Someone's own page\n"


def test_code_of_a_card_runs(checkpoint, capsys):
    card = model_card(MANIFEST, "someone/model")
    code = card.partition("```python\n")[2].partition("```")[0]
    code = code.replace("path/to/this/directory", str(checkpoint))
    code = code.replace("The capital of France is", "w1 w2 w3")  # words that the tiny one knows
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def yaml_of(card: str) -> str:
    return card.partition("```yaml\n")[2].partition("\n```")[0]


def test_recipe_of_a_card_repeats_the_run(llama, tmp_path):
    out_dir, again = tmp_path / "out", tmp_path / "again"
    section = {"dataset": "wikitext2-valid", "num_samples": 4, "sequence_length": 16}
    pipeline.quantize(Location(llama), out_dir, recipe("gptq", calibration=section, seed=3))
    card = (out_dir / "README.md").read_text(encoding="utf-8")
    assert "qtool quantize --recipe recipe.yaml MODEL OUT_DIR" in card
    (tmp_path / "recipe.yaml").write_text(yaml_of(card), encoding="utf-8")
    pipeline.quantize(Location(llama), again, load_recipe(str(tmp_path / "recipe.yaml")))
    first, second = ((one / "model.safetensors").read_bytes() for one in (out_dir, again))
    assert first == second


def test_every_bundled_text_has_a_licence_in_the_list_and_on_its_page():
    page = (resources.texts_dir() / "LICENSE-texts.md").read_text(encoding="utf-8")
    assert set(TEXT_LICENCES) == set(bundled())
    for name, licence in TEXT_LICENCES.items():
        assert name in page
        for word in licence.split(", "):
            assert word in page.replace("Apache\n", "Apache").replace("\n", " "), word
    assert text_licence("hub:allenai/c4:en:train") == "see its page on the hub"
    assert "ask there" in text_licence("mine.jsonl")


if __name__ == "__main__":
    GOLDEN.write_text(whole_card(), encoding="utf-8")
