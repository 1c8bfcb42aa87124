"""The edge of the server: keys, sizes and times of requests, clients that go away."""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qtool.serving.refusals import RefusalError
from qtool.storage.plain_json import JsonValue, json_text

Finished = TypeVar("Finished")
OPEN_PATH = "/health"
"""What is answered without a key."""
DEADLINE = "qtool.deadline"
"""Key of the ASGI scope: when the event loop's clock says that a request has taken too long."""
TIMEOUT = RefusalError(504, "The request took longer than the server allows.", code="timeout")


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


def json_response(
    body: JsonValue, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Return an answer of JSON."""
    text = json_text(body, indent=None)
    return Response(text, status, headers=headers, media_type="application/json")


def refusal_response(refusal: RefusalError) -> Response:
    """Return what a refused request gets."""
    return json_response(refusal.body(), refusal.status, refusal.headers)


@dataclass(frozen=True, slots=True)
class RequestGate:
    """An ASGI application before another: it asks for the key, and reads bodies within limits."""

    app: ASGIApp
    api_key: str | None
    max_body_bytes: int
    timeout_seconds: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the application answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            async with asyncio.timeout(self.timeout_seconds):
                body = await self._body(scope, receive)
        except RefusalError as refusal:
            await refusal_response(refusal)(scope, receive, send)
            return
        except TimeoutError:
            await refusal_response(TIMEOUT)(scope, receive, send)
            return
        except ClientGoneError:
            return
        scope[DEADLINE] = asyncio.get_running_loop().time() + self.timeout_seconds
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            return next(messages, None) or await receive()

        await self.app(scope, replay, send)

    def _check_key(self, scope: Scope) -> None:
        if self.api_key is None or scope["path"] == OPEN_PATH:
            return
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        is_right = hmac.compare_digest(key.strip(), self.api_key.encode())
        if scheme.lower() != b"bearer" or not is_right:
            raise RefusalError(
                401,
                "Wrong or missing API key. Send the header `Authorization: Bearer KEY`, with the "
                "key that the server was started with.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        told = dict(scope["headers"]).get(b"content-length", b"0")
        self._check_size(int(told) if told.isdigit() else 0)
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            self._check_size(size)
        return b"".join(parts)

    def _check_size(self, size: int) -> None:
        if size > self.max_body_bytes:
            raise RefusalError(
                413,
                f"The body has more than {self.max_body_bytes:,} bytes, which is the most that "
                "this server reads.",
                code="body_too_large",
                headers={"Connection": "close"},
            )


async def while_connected(
    receive: Receive, work: Coroutine[Any, Any, Finished], deadline: float
) -> Finished:
    """Do something for a client, for as long as it is there and there is time.

    Raises:
        ClientGoneError: it has gone; the work is cancelled.
        TimeoutError: so is work that isn't done by the deadline, on the event loop's clock.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    left = deadline - asyncio.get_running_loop().time()
    try:
        done, _ = await asyncio.wait(
            {working, watching}, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED
        )
        if working in done:
            return working.result()
        raise ClientGoneError if watching in done else TimeoutError
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events; where they fail, the last one says so."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        """Take events, and what to call in the end."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of them, or stop where nobody reads them."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        refusal = None
        try:
            await send(start)
            await while_connected(receive, self._send(send), scope[DEADLINE])
        except ClientGoneError:
            return
        except TimeoutError:
            refusal = TIMEOUT
        except RefusalError as error:
            refusal = error
        finally:
            self._close()
        last = b"" if refusal is None else event_of(refusal.body())
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _send(self, send: Send) -> None:
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})


def event_of(body: JsonValue) -> bytes:
    """Return one event."""
    return b"data: %s\n\n" % json.dumps(body, allow_nan=False, separators=(",", ":")).encode()


def seconds_since(begin: float) -> float:
    """Return seconds by the clock that `time.monotonic` reads."""
    return time.monotonic() - begin
