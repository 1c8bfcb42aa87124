"""What evaluations add to a checkpoint's card, and whose page is never touched."""

import json
import shutil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool import pipeline
from qtool.checkpoint.marks import foreign_entries, sealed, unsealed
from qtool.errors import OutputError
from qtool.modeling.digest import model_digest
from qtool.modeling.locate import Location
from qtool.pipeline import card as cards
from qtool.pipeline.card import read_measured
from qtool.pipeline.evaluate import EvalOptions
from tests.helpers import recipe, warnings_in

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r"))


@pytest.fixture
def out_dir(checkpoint, tmp_path):
    target = tmp_path / "out"
    shutil.copytree(checkpoint, target)
    for name in ("README.md", "measured.json"):
        (target / name).unlink(missing_ok=True)
    pristine = tmp_path / "pristine"
    pipeline.quantize(Location(tmp_path / "model"), pristine, recipe())
    shutil.copy(pristine / "README.md", target / "README.md")
    return target


@pytest.fixture(autouse=True)
def model(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def evaluate(text_file, model):
    def run(out_dir, *, length: int = 40, baseline: bool = True) -> list[Any]:
        events: list[Any] = []
        options = EvalOptions(
            dataset=str(text_file), context_length=length, max_windows=2, texts=False
        )
        original = Location(model) if baseline else None
        pipeline.evaluate(Location(out_dir), options, baseline=original, emit=events.append)
        return warnings_in(events)

    return run


def card_of(directory) -> str:
    return (directory / "README.md").read_text(encoding="utf-8")


def test_evaluation_is_added_and_a_newer_one_replaces_it(out_dir, evaluate):
    assert "Nothing was measured yet" in card_of(out_dir)
    digest = model_digest(out_dir)
    assert evaluate(out_dir) == []
    first = card_of(out_dir)
    assert "first 2 of 15 windows of 40 tokens, float32 on cpu" in first
    assert "| words.txt, windows of 40 tokens | " in first
    assert "Nothing was measured yet" not in first
    evaluate(out_dir, length=50, baseline=False)
    second = card_of(out_dir)
    assert "windows of 50 tokens" in second
    assert "windows of 40 tokens" not in second
    assert "original |\n" not in second.partition("<!-- measured -->")[2].partition("<!--")[0]
    assert model_digest(out_dir) == digest, "kept scores stay valid"
    assert foreign_entries(out_dir) == []


@pytest.mark.parametrize("edit", ["# My page\n", "edited"])
def test_page_that_somebody_wrote_or_edited_stays(out_dir, evaluate, model, edit):
    page = edit if edit.startswith("#") else card_of(out_dir).replace("quantized", "squeezed")
    (out_dir / "README.md").write_text(page, encoding="utf-8")
    assert evaluate(out_dir) == []
    assert card_of(out_dir) == page
    assert read_measured(out_dir).texts is not None
    assert foreign_entries(out_dir) == ["README.md"]
    with pytest.raises(OutputError, match=r"what qtool didn't write: README\.md"):
        pipeline.quantize(Location(model), out_dir, recipe(), overwrite=True)
    assert card_of(out_dir) == page


def test_card_of_a_version_without_seals_is_replaced_and_not_added_to(out_dir, evaluate, model):
    old = "---\ntags: [qtool]\n---\n# x, quantized\n\nQuantized with qtool 0.0.9: 14 layers.\n"
    (out_dir / "README.md").write_text(old, encoding="utf-8")
    evaluate(out_dir)
    assert card_of(out_dir) == old
    pipeline.quantize(Location(model), out_dir, recipe(), overwrite=True)
    assert unsealed(card_of(out_dir)) is not None
    assert not (out_dir / "measured.json").exists(), "it was measured of what is gone"


def test_checkpoint_without_a_card_gets_none(out_dir, evaluate):
    (out_dir / "README.md").unlink()
    assert evaluate(out_dir) == []
    assert not (out_dir / "README.md").exists()
    assert foreign_entries(out_dir) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"texts": 5}', '{"tasks": {"a": {}}}'])
def test_damaged_record_is_begun_anew(out_dir, evaluate, content):
    (out_dir / "measured.json").write_text(content)
    assert evaluate(out_dir) == []
    assert read_measured(out_dir).texts is not None


def test_record_reads_back_as_it_was(out_dir, evaluate):
    evaluate(out_dir)
    kept = read_measured(out_dir)
    assert kept.texts is not None
    assert kept.texts.perplexity is not None
    (close,) = kept.texts.closeness
    assert close.positions == 2 * 39
    assert json.loads((out_dir / "measured.json").read_text())["texts"]["perplexity"] > 1


def test_what_cannot_be_written_is_a_warning(out_dir, evaluate, monkeypatch):
    def fail(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(cards, "write_json_file", fail)
    before = card_of(out_dir)
    (message,) = evaluate(out_dir)
    assert "The model card in" in message
    assert "Read-only file system" in message
    assert card_of(out_dir) == before


def test_what_a_killed_run_leaves_is_no_bodys_file(out_dir):
    for name in ("measured.json", "README.md"):
        (out_dir / f"{name}.0123456789ab.partial").write_text("{")
    (out_dir / "mine.0123456789ab.partial").write_text("{")
    assert foreign_entries(out_dir) == ["mine.0123456789ab.partial"]


def test_original_gets_nothing(model, evaluate):
    before = sorted(path.name for path in model.iterdir())
    evaluate(model)
    assert sorted(path.name for path in model.iterdir()) == before


def test_check_after_quantizing_is_on_the_card(model, tmp_path):
    section = {"dataset": "wikitext2-valid", "num_samples": 4, "sequence_length": 16}
    out_dir = tmp_path / "checked"
    asked = recipe("gptq", calibration=section)
    result = pipeline.quantize(Location(model), out_dir, asked, check=True)
    assert result.check is not None
    assert result.check.text is not None
    kept = read_measured(out_dir).texts
    assert kept is not None
    assert kept.closeness[0].kl == result.check.text.kl_divergence
    assert "| against the original, on |" in card_of(out_dir)
    assert "perplexity on" not in card_of(out_dir)


@given(TEXT)
def test_seal_tells_who_wrote_a_page(text):
    assert unsealed(sealed(text)) == text
    assert unsealed(text) is None or text.endswith("-->\n")
    assert unsealed(sealed(text).replace("\n", "\r\n")) == text


@given(TEXT, st.integers(0), st.sampled_from("xy\n"))
def test_edited_page_has_no_seal(text, place, letter):
    page = sealed(text)
    where = place % (len(page) + 1)
    assert unsealed(page[:where] + letter + page[where:]) is None
