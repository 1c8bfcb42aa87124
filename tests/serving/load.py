"""Many clients at once, good and bad, over a server; every good answer is compared with `generate`.

By hand, for two minutes: `python -m tests.serving.load OUT_DIR --seconds 120 --clients 64`. It
starts `qtool serve OUT_DIR` itself, and fails with what went wrong.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PATIENCE = 60.0
HUGE_BYTES = 5 * 2**20


@dataclass(frozen=True)
class Case:
    """A good request and its answer."""

    path: str
    body: dict[str, Any]
    expected: str


@dataclass
class Report:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def expect(self, kind: str, truth: bool, why: str) -> None:
        self.counts[kind] += 1
        if not truth:
            self.wrong.append(f"{kind}: {why}"[:500])


def cases(model: Any, tokenizer: Any, count: int, seed: int = 0) -> list[Case]:
    """Return greedy requests, and what `generate` makes of them."""
    generator = random.Random(seed)
    found = []
    for number in range(count):
        length, most = generator.randint(1, 60), generator.randint(1, 40)
        words = " ".join(f"w{generator.randint(3, 95)}" for _ in range(length))
        chat = [{"role": "user", "content": words}]
        path = "/v1/completions"
        asked: dict[str, Any] = {"prompt": words}
        ids = tokenizer(words).input_ids
        if number % 2:
            path, asked = "/v1/chat/completions", {"messages": chat}
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False).input_ids
        with torch.no_grad():
            output = model.generate(torch.tensor([ids]), max_new_tokens=most, do_sample=False)
        text = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        text = " " + text if text and not number % 2 else text  # goes on where the prompt ends
        body = {**asked, "max_tokens": most, "temperature": 0}
        found.append(Case(path, body, text))
    return found


@dataclass(frozen=True)
class Place:
    """Where a server is."""

    port: int
    host: str = "127.0.0.1"

    async def send(
        self, path: str, body: bytes, *, method: str = "POST"
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self.host}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        return reader, writer

    async def ask(self, path: str, body: bytes, *, method: str = "POST") -> tuple[int, bytes]:
        """Return status and body."""
        reader, writer = await self.send(path, body, method=method)
        try:
            raw = await asyncio.wait_for(reader.read(), PATIENCE)
        except ConnectionResetError:
            return 0, b""
        finally:
            writer.close()
        head, _, rest = raw.partition(b"\r\n\r\n")
        found = re.match(rb"HTTP/1.1 (\d+)", head)
        chunked = b"transfer-encoding: chunked" in head.lower()
        return int(found[1]) if found else 0, unchunked(rest) if chunked else rest

    async def health(self) -> dict[str, Any]:
        return json.loads((await self.ask("/health", b"", method="GET"))[1])


def unchunked(raw: bytes) -> bytes:
    parts = []
    while raw:
        size, _, raw = raw.partition(b"\r\n")
        length = int(size, 16)
        parts.append(raw[:length])
        raw = raw[length + 2 :]
    return b"".join(parts)


def streamed(raw: bytes) -> str:
    """Return the text of a stream, which must have ended well."""
    events = [line[6:] for line in raw.split(b"\n\n") if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]", events[-1]
    choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
    assert choices[-1]["finish_reason"] in ("stop", "length")
    return "".join(one.get("text") or one.get("delta", {}).get("content") or "" for one in choices)


def whole(raw: bytes) -> str:
    (choice,) = json.loads(raw)["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


async def good(place: Place, case: Case, report: Report, *, stream: bool) -> None:
    body = json.dumps({**case.body, "stream": stream}).encode()
    status, raw = await place.ask(case.path, body)
    while status == 429:
        report.counts["429"] += 1
        await asyncio.sleep(0.05)
        status, raw = await place.ask(case.path, body)
    text = (streamed if stream else whole)(raw) if status == 200 else ""
    kind = "good stream" if stream else "good"
    told = f"{status}, {text!r} in place of {case.expected!r}"
    report.expect(kind, status == 200 and text == case.expected, told)


async def leaves(place: Place, case: Case, report: Report, wait: float, *, stream: bool) -> None:
    """Go away in the middle."""
    body = json.dumps({**case.body, "max_tokens": 400, "stream": stream}).encode()
    reader, writer = await place.send(case.path, body)
    with contextlib.suppress(TimeoutError, ConnectionError):
        await asyncio.wait_for(reader.read(300) if stream else asyncio.sleep(wait), wait + 0.01)
    writer.transport.abort()
    report.counts["gone"] += 1


async def half(place: Place, case: Case, report: Report) -> None:
    """Go away within the body."""
    _, writer = await asyncio.open_connection(place.host, place.port)
    body = json.dumps(case.body).encode()
    head = f"POST {case.path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body) + 9}\r\n\r\n"
    writer.write(head.encode() + body)
    with contextlib.suppress(ConnectionError):
        await writer.drain()
    writer.transport.abort()
    report.counts["half"] += 1


BAD = {
    b'{"messages": [': 400,
    b"[1, 2, 3]": 400,
    b'{"messages": "hello"}': 400,
    b'{"prompt": 7}': 400,
    b"\xff\xfe\x00": 400,
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}': 400,
    b'{"messages": [{"role": "user", "content": "w3"}], "temperature": NaN}': 400,
    b'{"messages": [{"role": "user", "content": "w3"}], "n": 1000000}': 400,
    b'{"messages": ' + b"[" * 100_000: 400,
    b"": 400,
}


async def bad(place: Place, body: bytes, status: int, report: Report) -> None:
    got, raw = await place.ask("/v1/chat/completions", body)
    is_told = got == status and "message" in json.loads(raw)["error"]
    report.expect("bad", is_told, f"{body[:60]!r} gave {got}: {raw[:200]!r}")


async def huge(place: Place, report: Report, *, over: bool) -> None:
    words = "w5 " * (HUGE_BYTES // 3 if over else 30_000)
    body = json.dumps({"messages": [{"role": "user", "content": words}]}).encode()
    status, _ = await place.ask("/v1/chat/completions", body)
    report.expect("huge", status in ((413, 0) if over else (400,)), f"{status}")


async def client(
    place: Place, known: Sequence[Case], report: Report, end: float, seed: int
) -> None:
    generator = random.Random(seed)
    while time.monotonic() < end:
        case, what = generator.choice(known), generator.random()
        if what < 0.7:
            await good(place, case, report, stream=generator.random() < 0.5)
        elif what < 0.85:
            wait = generator.random() * 0.3
            await leaves(place, case, report, wait, stream=generator.random() < 0.5)
        elif what < 0.88:
            await half(place, case, report)
        elif what < 0.98:
            body, status = generator.choice(list(BAD.items()))
            await bad(place, body, status, report)
        else:
            await huge(place, report, over=generator.random() < 0.3)


async def run(place: Place, known: Sequence[Case], *, seconds: float, clients: int) -> Report:
    """Let clients ask, and wait until the server has nothing to do."""
    report, end = Report(), time.monotonic() + seconds
    async with asyncio.TaskGroup() as group:
        for seed in range(clients):
            group.create_task(client(place, known, report, end, seed))
    deadline = time.monotonic() + 20
    while (health := await place.health()) != {"status": "ok", "running": 0, "waiting": 0}:
        assert time.monotonic() < deadline, f"the server still has {health}"
        await asyncio.sleep(0.05)
    return report


def resources(pid: int) -> dict[str, int]:
    """Return memory in kB, open files and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    memory, threads = re.search(r"VmRSS:\s*(\d+)", status), re.search(r"Threads:\s*(\d+)", status)
    assert memory and threads
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return {"kB": int(memory[1]), "files": files, "threads": int(threads[1])}


async def watched(pid: int, work: Coroutine[Any, Any, Report]) -> Report:
    """Say every ten seconds what a process takes."""

    async def watch() -> None:
        while True:
            await asyncio.sleep(10)
            tell(resources(pid))

    watching = asyncio.create_task(watch())
    try:
        return await work
    finally:
        watching.cancel()


def tell(*what: object) -> None:
    sys.stdout.write(" ".join(map(str, what)) + "\n")


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("out_dir")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--options", default="", help="more options of `qtool serve`")
    options = parser.parse_args()
    import qtool  # noqa: F401 - registers the format

    model = AutoModelForCausalLM.from_pretrained(options.out_dir, dtype=torch.float32)
    known = cases(model, AutoTokenizer.from_pretrained(options.out_dir), 40)
    command = [sys.executable, "-m", "qtool", "serve", options.out_dir, "--port", "0"]
    command += options.options.split()
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    port = 0
    for line in server.stderr:
        if found := re.search(r"http://[\d.]+:(\d+)/v1", line):
            port = int(found[1])
            break
    try:
        place = Place(port)
        asyncio.run(run(place, known, seconds=5, clients=options.clients))  # all is warm
        tell("before", resources(server.pid))
        seconds, clients = options.seconds, options.clients
        report = asyncio.run(
            watched(server.pid, run(place, known, seconds=seconds, clients=clients))
        )
        time.sleep(6)  # connections that are kept alive end
        tell("after", resources(server.pid))
        tell(dict(report.counts), *report.wrong[:20])
    finally:
        server.send_signal(signal.SIGTERM)
        tell(server.stderr.read()[-2000:])
        code = server.wait(60)
    tell("exit code", code)
    sys.exit(1 if report.wrong or code else 0)


if __name__ == "__main__":
    main()
