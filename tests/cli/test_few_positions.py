"""A model of few learned positions: whatever runs it gives it no more, or says so."""

import json

import pytest

from qtool.base import ignore_events
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.pipeline.written_scores import read_questions, write_answers
from qtool.runtime.backends._choose import use_backend
from qtool.timing.model import time_model
from tests import families
from tests.families import text

POSITIONS = 20
"""No multiple of what batches are filled up to."""
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
RTN = ("--method", "rtn", "--bits", "8", "--group-size", "32", "--no-check")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a model with a chat template; beyond its positions torch raises IndexError."""
    directory = tmp_path_factory.mktemp("few")
    families.build("opt", max_position_embeddings=POSITIONS).save_pretrained(directory)
    families.save_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(CHAT)
    return directory


def test_few_positions_bound_what_is_read_learned_and_timed(cli, source, tmp_path):
    out = tmp_path / "out"
    assert cli("quantize", *RTN, source, out).code == 0
    pairs = tmp_path / "pairs.jsonl"
    lines = [{"prompt": text(9, seed), "completion": text(30, seed)} for seed in range(4)]
    pairs.write_text("\n".join(map(json.dumps, lines)))
    assert cli("adapt", out, pairs, tmp_path / "adapter", "--epochs", "1").code == 0
    with use_backend("dense"):  # what is bounded needs no compiled kernels
        loaded = load_model(Location(out), device="cpu")
        speed = time_model(loaded, repeats=1)
        assert speed.prompt_tokens + speed.decode_tokens <= POSITIONS
        questions = read_questions(pairs, loaded.tokenizer)
        answers, count = write_answers(loaded, questions, 40, ignore_events)
    assert len(answers) == len(questions)
    assert 0 < count < 40 * len(questions)
    pairs.write_text(json.dumps({"prompt": text(30), "completion": "w3"}))
    said = cli("eval", out, "--pairs", pairs)
    assert said.code == 1
    assert f"has {POSITIONS} positions" in said.err
