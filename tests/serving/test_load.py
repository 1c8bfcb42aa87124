"""Many clients at once, good and bad, and prompts read in parts: nothing is wrong or stays."""

import asyncio
import os

import pytest

from qtool.runtime.decode.read_model import weights_of
from qtool.runtime.decode.slots import SlotRunner
from qtool.runtime.decode.torch_ops import OPS
from qtool.serving import decoders
from qtool.serving.decoders import RunnerDecoder
from tests.serving import load
from tests.serving.conftest import LENGTH

SECONDS = float(os.environ.get("QTOOL_TEST_LOAD_SECONDS", "3"))
CLIENTS = int(os.environ.get("QTOOL_TEST_LOAD_CLIENTS", "24"))
NEEDED = ("good", "good stream", "gone", "half", "bad")


@pytest.mark.parametrize("name", ["runner", "forward"])
def test_good_answers_are_those_of_generate_and_nothing_stays(
    serve, loaded, forward, monkeypatch, name
):
    monkeypatch.setattr(decoders, "PROMPT_TOKENS_ALONE", 40)
    monkeypatch.setattr(decoders, "PROMPT_TOKENS_BESIDE", 16)
    decoder = forward
    if name == "runner":
        runner = SlotRunner(weights_of(loaded.model), OPS, max_length=LENGTH, slots=6)
        decoder = RunnerDecoder(runner)
    known = load.cases(loaded.model, loaded.tokenizer, 12)
    with serve(decoder, max_requests=20) as server:
        before = load.resources(os.getpid())
        place = load.Place(server.port)
        report = asyncio.run(load.run(place, known, seconds=SECONDS, clients=CLIENTS))
        after = load.resources(os.getpid())
    assert not report.wrong, report.wrong
    assert not server.server, server.server
    assert all(report.counts[kind] for kind in NEEDED), report.counts
    assert after["files"] <= before["files"] + 8, "connections that are kept alive end later"
