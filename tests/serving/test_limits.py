"""What a server doesn't do, and what it says then."""

import asyncio
import http.client
import json
import threading
import time
from typing import Any

import pytest

from qtool.integrations.transformers.generate import use_runner
from qtool.serving.decoders import ForwardDecoder
from qtool.serving.opening import DecoderOptions, open_decoder
from tests.serving.conftest import LENGTH
from tests.serving.load import BAD, Place, Report, bad, cases, run

pytest.importorskip("fastapi", reason="the extra `serve` isn't installed")
COMPLETION = {"prompt": "w3 w4", "max_tokens": 3, "temperature": 0}


class Slow(ForwardDecoder):
    """Takes no step while its gate is closed."""

    broken = False

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.gate = threading.Event()

    def step(self, tokens):
        assert self.gate.wait(60)
        if self.broken:
            raise RuntimeError("the card has fallen off")
        return super().step(tokens)


@pytest.fixture
def slow(loaded):
    decoder = Slow(loaded.model, max_length=LENGTH, slots=2)
    yield decoder
    decoder.gate.set()


def request(running, path="/v1/completions", body=COMPLETION, method="POST", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, sent, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text), answer.headers


def later(function, *arguments, **named):
    """Run something in a thread; return the thread and the list that gets its result."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments, **named)))
    thread.start()
    return thread, results


def wait_for(truth, seconds=30.0):
    end = time.monotonic() + seconds
    while not truth():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_malformed_bodies(running):
    report = Report()

    async def send():
        for body, status in BAD.items():
            await bad(Place(running.port), body, status, report)

    asyncio.run(send())
    assert report.wrong == []


ODD: dict[str, tuple[dict[str, Any], str, str]] = {
    "max_tokens": ({"prompt": "w3", "max_tokens": "5"}, "max_tokens", "integer"),
    "too many": ({"prompt": "w3", "max_tokens": 10**300}, "max_tokens", "less than"),
    "temperature": ({"prompt": "w3", "temperature": True}, "temperature", "number"),
    "stream": ({"prompt": "w3", "stream": "false"}, "stream", "boolean"),
    "logprobs of a chat": ({"prompt": "w3", "logprobs": True}, "logprobs", "integer"),
    "seed": ({"prompt": "w3", "seed": 1.5}, "seed", "integer"),
    "token": ({"prompt": [True]}, "prompt.0", "string"),
    "prompt": ({"prompt": {"text": "w3"}}, "prompt", "string"),
    "mixed": ({"prompt": ["w3", 4]}, "prompt.1", "string"),
    "stop": ({"prompt": "w3", "stop": ["w4", 5]}, "stop.1", "string"),
    "penalty": ({"prompt": "w3", "frequency_penalty": 0.5}, "frequency_penalty", "leave it out"),
    "no content": ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
    "null": ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "string"),
    "number": ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "string"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content.0.type",
        "'text'",
    ),
    "string": ({"messages": ["w3"]}, "messages.0", "object"),
    "no role": ({"messages": [{"content": "w3"}]}, "messages.0.role", "required"),
}


@pytest.mark.parametrize("name", ODD)
def test_wrong_types_are_refused_by_the_name_of_their_place(running, name):
    body, param, said = ODD[name]
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    status, answer, _ = request(running, path, body)
    error = answer["error"]
    assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert error["message"].startswith(f"{param}: ")
    assert said in error["message"]


def test_numbers_that_clients_write_otherwise_are_taken(running):
    body = {**COMPLETION, "temperature": 0, "top_p": 1, "frequency_penalty": 0.0, "best_of": 1}
    assert request(running, body={**body, "n": 1, "stream": False})[0] == 200


@pytest.mark.parametrize(
    "body", [b'{"prompt": "\xff"}', b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"]
)
def test_what_cannot_be_parsed_is_said_to_be_no_json(running, body):
    status, answer, _ = request(running, body=body)
    assert (status, answer["error"]["code"]) == (400, "invalid_json")
    assert answer["error"]["message"].startswith("The body isn't JSON")


def test_a_body_has_to_say_that_it_is_json(running):
    status, answer, _ = request(running, **{"Content-Type": "text/plain"})
    assert status == 400
    assert "Content-Type: application/json" in answer["error"]["message"]


def test_other_places_and_methods(running):
    status, answer, _ = request(running, "/v1/embeddings")
    assert status == 404
    assert "/v1/chat/completions" in answer["error"]["message"]
    status, answer, _ = request(running, method="GET", body=None)
    assert status == 405


def test_the_key_is_asked_for(serve):
    with serve(api_key="sesame") as running:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "sesame"}):
            status, answer, _ = request(running, **headers)
            assert status == 401
            assert answer["error"]["code"] == "invalid_api_key"
        for scheme in ("Bearer", "bearer"):  # RFC 9110: its case doesn't matter
            assert request(running, Authorization=f"{scheme} sesame")[0] == 200
        assert request(running, "/health", None, "GET")[0] == 200


def test_large_bodies_are_not_read(serve):
    from qtool.serving.app import RequestLimits

    with serve(limits=RequestLimits(max_body_bytes=2000)) as running:
        status, answer, _ = request(running, body=b" " * 2001)
        assert status == 413
        assert "2,000 bytes" in answer["error"]["message"]
        parts = iter([b" " * 1000] * 3)
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
        connection.request("POST", "/v1/completions", parts, encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()


def test_long_prompts_are_refused(running):
    status, answer, _ = request(running, body={"prompt": "w3 " * 300})
    assert status == 400
    assert answer["error"]["code"] == "context_length_exceeded"
    assert "300 in the prompt" in answer["error"]["message"]


def test_a_full_queue_says_when_to_come_again(serve, slow):
    with serve(slow, max_requests=2) as running:
        body = {**COMPLETION, "max_tokens": 6}
        thread, results = later(request, running, body={**body, "n": 2})
        wait_for(lambda: running.engine.num_open == 2)
        status, answer, headers = request(running)
        assert status == 429
        assert headers["Retry-After"] == "1"
        assert answer["error"]["type"] == "rate_limit_error"
        assert request(running, body={**body, "n": 3})[0] == 400
        slow.gate.set()
        thread.join()
        assert results[0][0] == 200
        assert request(running)[0] == 200


def test_a_request_that_takes_too_long_is_told(serve, slow):
    from qtool.serving.app import RequestLimits

    with serve(slow, limits=RequestLimits(timeout_seconds=1.0)) as running:
        body = {**COMPLETION, "max_tokens": 200}
        assert request(running, body=body)[0] == 504
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
        sent = json.dumps({**body, "stream": True})
        connection.request("POST", "/v1/completions", sent, {"Content-Type": "application/json"})
        text = connection.getresponse().read()
        connection.close()
        last = json.loads(text.strip().split(b"\n\n")[-1].removeprefix(b"data: "))
        assert last["error"]["code"] == "timeout"
        slow.gate.set()
        wait_for(lambda: running.engine.num_open == 0)
        assert request(running)[0] == 200
        half = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
        half.putrequest("POST", "/v1/completions")
        half.putheader("Content-Length", "10")
        half.endheaders(b"{")
        assert half.getresponse().status == 504
        half.close()


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_is_forgotten(serve, slow, stream):
    with serve(slow) as running:
        body = json.dumps({**COMPLETION, "max_tokens": 200, "stream": stream, "n": 3})
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        wait_for(lambda: running.engine.load.running == 2)
        assert running.engine.load.waiting == 1
        connection.close()
        wait_for(lambda: running.engine.num_open == 0)
        slow.gate.set()
        wait_for(lambda: running.engine._batch.is_idle)
        assert slow._caches == [None, None]
        assert request(running)[0] == 200
        assert running.engine._streams == {}


def test_running_requests_are_finished_before_it_ends(serve, slow):
    with serve(slow) as running:
        thread, results = later(request, running, body={**COMPLETION, "max_tokens": 30})
        wait_for(lambda: running.engine.load.running == 1)
        running.engine.on_failure()  # as a signal does
        wait_for(lambda: not running.engine.is_ready)
        slow.gate.set()
        thread.join()
        running.thread.join(30)
        status, answer, _ = results[0]
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 30
        assert not running.server


def test_who_is_not_finished_in_time_is_told(serve, slow):
    with serve(slow, grace_seconds=0.3) as running:
        body = {**COMPLETION, "max_tokens": 200}
        thread, results = later(request, running, body=body)
        wait_for(lambda: running.engine.load.running == 1)
        running.engine.on_failure()
        thread.join()
        slow.gate.set()
        status, answer, _ = results[0]
        assert status == 503
        assert "being shut down" in answer["error"]["message"]


def test_a_model_that_fails_ends_the_server(serve, slow):
    with serve(slow) as running:
        thread, results = later(request, running, body={**COMPLETION, "max_tokens": 200})
        wait_for(lambda: running.engine.load.running == 1)
        slow.broken = True
        slow.gate.set()
        thread.join()
        assert results[0][0] == 503
        running.thread.join(30)
        (error,) = running.server
        assert "can't run any more" in str(error)


def test_health_says_how_much_there_is_to_do(serve, slow):
    with serve(slow) as running:
        assert request(running, "/health", None, "GET")[1] == {
            "status": "ok",
            "running": 0,
            "waiting": 0,
        }
        thread, _ = later(request, running, body={**COMPLETION, "n": 5})
        wait_for(lambda: running.engine.load.running == 2)
        health = request(running, "/health", None, "GET")[1]
        assert health == {"status": "ok", "running": 2, "waiting": 3}
        slow.gate.set()
        thread.join()


@pytest.mark.parametrize("mode", ["always", "never"])
def test_many_clients_good_and_bad(serve, loaded, mode):
    """By the decode runner, and by transformers."""
    with use_runner(mode):
        decoder = open_decoder(loaded, DecoderOptions(slots=8))
    known = cases(loaded.model, loaded.tokenizer, 12)
    before = threading.active_count()
    with serve(decoder, max_requests=24) as running:
        report = asyncio.run(run(Place(running.port), known, seconds=2.5, clients=64))
        assert report.wrong == []
        assert {"good", "good stream", "gone", "bad"} <= report.counts.keys()
        assert running.engine._streams == {}
    assert threading.active_count() <= before + 8  # the pool that reads prompts is kept
