"""A model of few learned positions: whatever runs it gives it no more, or says so."""

import json

import pytest

from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
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
    speed = time_model(load_model(Location(out), device="cpu"), repeats=1)
    assert speed.prompt_tokens + speed.decode_tokens <= POSITIONS
    assert cli("eval", out, "--pairs", pairs, "--answer-tokens", "40").code == 0
    pairs.write_text(json.dumps({"prompt": text(30), "completion": "w3"}))
    said = cli("eval", out, "--pairs", pairs)
    assert said.code == 1
    assert f"has {POSITIONS} positions" in said.err
