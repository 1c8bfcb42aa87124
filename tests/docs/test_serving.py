"""docs/quickstart.md and docs/serve.md: the server that they start answers what they ask it."""

import http.client
import json
import os
import random
import shlex
import signal
import socket
import threading
from typing import Any
from urllib.parse import urlsplit

import pytest

from qtool import pipeline
from qtool.modeling.locate import Location
from tests.cli.conftest import Cli
from tests.docs.pages import blocks, command_lines
from tests.helpers import ROOT, free_port, recipe

PAGES = [ROOT / "docs/quickstart.md", ROOT / "docs/serve.md"]
PORT = "8000"


def curl(line: str, port: int) -> bytes:
    """Send what a line sends, to another port, and return what comes."""
    words, headers, body, url = shlex.split(line)[1:], {}, None, ""
    while words:
        word = words.pop(0)
        if word == "-H":
            name, _, value = words.pop(0).partition(": ")
            headers[name] = value
        elif word == "-d":
            body = words.pop(0)
        else:
            url = word
    place = urlsplit(url)
    assert (place.hostname, place.port) == ("127.0.0.1", int(PORT))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", place.path, body, headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    assert answer.status == 200, text
    return text


def ask(port: int, said: list[str]) -> None:
    """Send all requests of both pages."""
    for page in PAGES:
        lines = [line for text in blocks(page, "") for line in text.splitlines()]
        said += [curl(line, port).decode() for line in lines if line.startswith("curl ")]


def when_ready(port: int, work, said) -> None:
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                threading.Event().wait(0.02)
        work(port, said)
    except BaseException as error:  # noqa: BLE001 - the main thread is told
        said.append(error)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def port() -> int:
    return free_port()


def test_server_of_the_pages_answers(cli: Cli, chat_llama, port, tmp_path, monkeypatch):
    pytest.importorskip("fastapi", reason="the extra `serve` isn't installed")
    for name in ("smollm2-w3", "OUT_DIR"):
        pipeline.quantize(Location(chat_llama), tmp_path / name, recipe())
    monkeypatch.chdir(tmp_path)
    drawn = random.Random  # else one answer in some fifty ends before it begins
    monkeypatch.setattr("qtool.serving.sampling.random.Random", lambda seed=None: drawn(seed or 0))
    starts = [line for page in PAGES for line in command_lines(page) if line.words[1] == "serve"]
    assert [line.words[1:3] for line in starts] == [
        ("serve", "smollm2-w3"),
        ("serve", "OUT_DIR"),
        ("serve", "OUT_DIR"),
    ]
    said: list[Any] = []
    thread = threading.Thread(target=when_ready, args=(port, ask, said))
    thread.start()
    done = cli("serve", "OUT_DIR", "--port", str(port))
    thread.join()
    assert done.code == 0
    (line,) = [line for line in done.said if line.startswith("Serving ")]
    told = f"Serving OUT_DIR at http://127.0.0.1:{port}/v1: 4 answers at a time, 512 tokens."
    assert line.startswith(told)
    chat, again, stream = said
    assert all(json.loads(one)["choices"][0]["message"]["content"] for one in (chat, again))
    assert stream.endswith("data: [DONE]\n\n")


def test_python_of_the_page_runs(cli: Cli, chat_llama, port, tmp_path):
    pytest.importorskip("fastapi", reason="the extra `serve` isn't installed")
    pytest.importorskip("openai", reason="the extra `dev` isn't installed")
    pipeline.quantize(Location(chat_llama), tmp_path / "q", recipe())
    (block,) = blocks(PAGES[1], "python")
    assert block.count(f":{PORT}/") == 1

    def run(port: int, _said: list[Any]) -> None:
        code = compile(block.replace(f":{PORT}/", f":{port}/"), "docs/serve.md", "exec")
        names: dict[str, Any] = {}
        exec(code, names)  # the page's own words
        names["stream"].close()
        names["client"].close()

    said: list[Any] = []
    thread = threading.Thread(target=when_ready, args=(port, run, said))
    thread.start()
    done = cli("serve", str(tmp_path / "q"), "--port", str(port))
    thread.join()
    assert (done.code, said) == (0, [])
    assert len(done.out.split()) > 1
