"""How closely a model follows its original on a text and on chats."""

import dataclasses
import json
import math

import pytest
import torch

from qtool.base import ignore_events
from qtool.data.corpora import Corpus
from qtool.errors import DataError
from qtool.evaluation.agreement import compare_to_reference, record_reference
from qtool.evaluation.closeness import compare_closely, record_references
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from tests import families
from tests.families import VOCABULARY, text

CHAT = [{"role": "user", "content": "w10 w11"}, {"role": "assistant", "content": "w12 w13"}]
TOKENS = [1, 10, 11, 2, 1, 12, 13, 2]
LENGTH = 32


@pytest.fixture(scope="module")
def loaded(chat_llama):
    return load_model(Location(chat_llama), device="cpu")


@pytest.fixture(scope="module")
def perturbed(chat_llama):
    model = load_model(Location(chat_llama), device="cpu")
    generator = torch.Generator().manual_seed(3)
    for weight in model.model.parameters():
        weight.data += 0.01 * torch.randn(weight.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": CHAT}) for _ in range(9)))
    return str(path)


@pytest.fixture(scope="module")
def corpus():
    return Corpus("words", text(100, seed=5))


def record(model, corpus, chats, **settings):
    return record_references(model, corpus, chats, ignore_events, context_length=LENGTH, **settings)


def test_chats_are_read_as_the_template_writes_them(loaded, corpus, chats):
    found = record(loaded, corpus, chats).chats
    assert found is not None
    assert found.windows.flatten().tolist() == (9 * TOKENS)[: 2 * LENGTH]
    assert (found.dataset, found.prompts) == ("chats.jsonl", ())


def test_both_are_measured_apart(loaded, perturbed, corpus, chats):
    found = compare_closely(perturbed, record(loaded, corpus, chats), ignore_events)
    alone = record_reference(loaded, corpus, context_length=LENGTH, prompts=0)
    assert found.text == compare_to_reference(perturbed, alone)
    assert found.chats is not None
    assert found.chats.kl_divergence > 1e-3
    assert found.chats.kl_divergence != found.text.kl_divergence
    assert found.no_chats is None


def test_windows_of_chats_are_no_longer_than_chats_are(loaded, monkeypatch, corpus, chats):
    monkeypatch.setattr("qtool.evaluation.closeness.MOST_CHAT_TOKENS", 16)
    found = record(loaded, corpus, chats)
    assert found.chats is not None
    assert (found.text.windows.shape[1], found.chats.windows.shape[1]) == (LENGTH, 16)


def test_half_precision_is_precise_enough(loaded, perturbed, corpus, chats):
    exact = compare_closely(perturbed, record(loaded, corpus, chats), ignore_events)
    half = record(loaded, corpus, chats, dtype=torch.float16)
    assert half.text.log_probabilities.dtype == torch.float16
    found = compare_closely(perturbed, half, ignore_events)
    for one, other in ((found.text, exact.text), (found.chats, exact.chats)):
        assert one is not None
        assert other is not None
        assert one.kl_divergence == pytest.approx(other.kl_divergence, abs=1e-5)


def test_what_fails_on_chats_costs_no_text(llama, loaded, corpus, tmp_path):
    plain = record(load_model(Location(llama), device="cpu"), corpus, "dialogues-test")
    assert (plain.chats, plain.no_chats) == (None, f"{llama.name} has no chat template.")
    (tmp_path / "few.jsonl").write_text(json.dumps({"messages": CHAT}))
    for name, words in (("nothing", "No such bundled"), (str(tmp_path / "few.jsonl"), "8 tokens")):
        few = record(loaded, corpus, name)
        assert few.chats is None
        assert few.no_chats is not None
        assert words in few.no_chats or "nothing" in few.no_chats
        found = compare_closely(loaded, few, ignore_events)
        assert found.no_chats == few.no_chats
        assert found.text is not None


def test_output_that_is_no_number_on_chats_alone_costs_no_text(loaded, corpus, chats, chat_llama):
    references = record(loaded, corpus, chats)
    model = load_model(Location(chat_llama), device="cpu")
    model.model.model.embed_tokens.weight.data[1] = math.nan  # <s> is in no plain text
    found = compare_closely(model, references, ignore_events)
    assert found.text is not None
    assert found.text.kl_divergence == pytest.approx(0, abs=1e-6)
    assert found.chats is None
    assert "not numbers" in str(found.no_chats)


def test_other_vocabulary_is_refused(loaded, corpus, chats):
    larger = families.build("llama", vocab_size=VOCABULARY + 8).float()
    other = dataclasses.replace(loaded, name="other", model=larger)
    with pytest.raises(DataError, match="vocabulary of 104"):
        compare_closely(other, record(loaded, corpus, chats), ignore_events)
