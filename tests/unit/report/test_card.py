from pathlib import Path
from typing import Any

import pytest
import yaml

from qtool import pipeline
from qtool.checkpoint.manifest import Manifest
from qtool.modeling.licence import read_licence
from qtool.modeling.locate import Location
from qtool.report.card import Provenance, model_card
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


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("README.md", "---\nlicense: mit\ntags: [x]\n---\n# Hi", {"license": "mit"}),
        ("README.md", "---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        (
            "README.md",
            "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "llama3", "license_link": "LICENSE"},
        ),
        ("README.md", "---\nlicense: [mit]\n---\n", {}),
        ("README.md", "---\nlicense: {\n---\n", {}),
        ("README.md", "---\n" + "[" * 5000 + "\n---\n", {}),
        ("README.md", "license: mit\n", {}),
        ("README.md", "---", {}),
        ("LICENSE", "   Apache License\n  Version 2.0, January 2004", {"license": "apache-2.0"}),
        ("LICENSE.md", "MIT License\n\nCopyright", {"license": "mit"}),
        ("LICENSE", "Some terms, unlike the MIT License", {}),
    ],
)
def test_licence_is_read_where_models_say_it(tmp_path: Path, name, content, expected):
    (tmp_path / name).write_bytes(content.encode())
    assert read_licence(tmp_path) == expected


def test_model_that_says_nothing_of_a_licence_has_none(tmp_path):
    assert read_licence(tmp_path) == {}
