"""docs/quickstart.md: its server answers its request."""

import http.client
import json
import shlex
import socket
import threading

from qtool import pipeline
from qtool.modeling.locate import Location
from tests.docs.pages import blocks, made_files
from tests.helpers import ROOT, recipe

PAGE = ROOT / "docs/quickstart.md"
PLACE = '("127.0.0.1", 8000)'


def test_server_of_the_page_answers(chat_llama, tmp_path, monkeypatch):
    assert [str(file) for file in made_files(PAGE)] == ["serve.py"]
    (server,) = [text for text in blocks(PAGE, "python") if "serve_forever" in text]
    (request,) = [text for text in blocks(PAGE, "") if text.startswith("curl")]
    _, _, body, address = shlex.split(request)
    assert address.startswith("http://127.0.0.1:8000/")
    pipeline.quantize(Location(chat_llama), tmp_path / "smollm2-w3", recipe())
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert server.count(PLACE) == 1
    server = server.replace(PLACE, f'("127.0.0.1", {port})')
    server = server.replace("serve_forever()", "handle_request()").replace(
        "HTTPServer((", "bound = HTTPServer(("
    )
    server = server.replace(").handle_request()", ")") + "ready.set()\nbound.handle_request()\n"
    server += "bound.server_close()\n"
    ready = threading.Event()
    code = compile(server, str(PAGE), "exec")
    thread = threading.Thread(target=exec, args=(code, {"ready": ready}), daemon=True)
    thread.start()
    assert ready.wait(60)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/chat/completions", body)
    answer = connection.getresponse()
    assert answer.status == 200
    (choice,) = json.loads(answer.read())["choices"]
    connection.close()
    thread.join(60)
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
