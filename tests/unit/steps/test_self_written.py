"""`dataset: model`: what a model writes is seeded, and has chats if it can."""

import json
import shutil
from typing import Any

import pytest
import torch

from qtool import pipeline
from qtool.base import ignore_events
from qtool.data.calibration_files import load_calibration
from qtool.errors import DataError
from qtool.modeling.load import load_tokenizer
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source
from qtool.recipe.calibration import CalibrationSection
from qtool.steps import self_written as module
from qtool.steps.self_written import self_written
from tests.helpers import steps_in

TEMPLATE = "{% for m in messages %}<s> {{ m.content }} </s> {% endfor %}"


@pytest.fixture
def chat_model(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_DOCUMENT", 24)
    monkeypatch.setattr(module, "OPENINGS", ("w5", "w6"))
    shutil.copytree(llama, tmp_path / "chatty")
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chatty")
    return tmp_path / "chatty"


def contents(model, *, num_tokens=500, seed=0):
    source = open_source(Location(model))
    written = self_written(source, num_tokens=num_tokens, seed=seed, emit=ignore_events)
    return [document.content for document in written.documents]


def test_seed_decides_what_is_written_and_leaves_the_callers_generator_alone(chat_model):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one = contents(chat_model)
    assert torch.rand(1) == expected
    assert one == contents(chat_model)
    assert one != contents(chat_model, seed=1)


def test_texts_and_chats_are_mixed(chat_model):
    written = contents(chat_model, num_tokens=400)
    chats = [content for content in written if not isinstance(content, str)]
    assert (len(written), len(chats)) == (32, 16)
    assert len({type(content) for content in written[:8]}) == 2
    for messages in chats:
        assert [turn["role"] for turn in messages] == ["user", "assistant"]
        assert messages[0]["content"].startswith(("w5", "w6"))
    assert not any("<s>" in str(content) or "</s>" in str(content) for content in written)
    words = sum(len(str(content).split()) for content in written)
    assert words > 300


def test_what_is_written_is_drawn_as_said_here_alone(chat_model):
    expected = contents(chat_model)
    path = chat_model / "generation_config.json"
    habits = {"top_p": 0.1, "repetition_penalty": 3.0, "return_dict_in_generate": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": True, **habits}))
    assert contents(chat_model) == expected


def test_model_without_a_template_writes_texts_alone(llama, monkeypatch):
    monkeypatch.setattr(module, "MOST_DOCUMENT", 24)
    assert all(isinstance(content, str) for content in contents(llama))


def test_model_that_fails_is_one_sentence(llama, monkeypatch):
    def fail(*_args, **_options):
        raise RuntimeError("out of everything")

    monkeypatch.setattr("transformers.GenerationMixin.generate", fail)
    with pytest.raises(DataError, match=r"can't write samples: out of everything\. Name a text"):
        contents(llama)


@pytest.mark.parametrize("share", [None, 0.5])
def test_samples_are_drawn_of_what_the_model_writes(chat_model, tmp_path, share):
    words = tmp_path / "words.txt"
    words.write_text("w3 w4\n\n" * 300)
    sources = [{"dataset": "model", "share": 0.5}, {"dataset": str(words), "share": 0.5}]
    own = {"dataset": "model"} if share is None else {"mixture": sources}
    section = CalibrationSection(num_samples=8, sequence_length=32, **own)
    events: list[Any] = []
    pipeline.calibrate(Location(chat_model), tmp_path / "cal", section, emit=events.append)
    drawn = load_calibration(tmp_path / "cal", load_tokenizer(chat_model))
    assert len(drawn.samples) == 8
    assert steps_in(events, "the model writes samples")[-1].total == (320 if share is None else 160)
    counts = drawn.provenance["special tokens"]
    assert counts["<s>"] > 0
    assert counts["</s>"] > 0
