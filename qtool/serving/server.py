"""Run the application on a socket until a signal ends it."""

import asyncio
import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import uvicorn

from qtool.errors import BackendError, OutputError
from qtool.serving.app import RequestLimits, make_app
from qtool.serving.engine import Engine
from qtool.serving.responder import Responder
from qtool.wording import reason

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SWITCH_SECONDS = 5e-4
"""How long a thread of Python waits for another at most: less than a step of a model takes."""
SHUT_DOWN = "The server is being shut down, and the answer wasn't finished in time."
LAST_SECONDS = 5
"""For clients to take what they were told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Where a server listens, and what it allows."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    limits: RequestLimits = field(default_factory=RequestLimits)
    grace_seconds: float = 30.0
    """After a signal, for what is running."""


def bound_socket(options: ServerOptions) -> socket.socket:
    """Return a socket that listens.

    Raises:
        OutputError: the port is taken, or the host isn't this machine's.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise OutputError(
            f"Can't listen on {options.host}, port {options.port}: {reason(error)}. Give another "
            "--port or --host; port 0 takes a free one."
        ) from error


def run_server(
    responder: Responder,
    options: ServerOptions,
    listening: socket.socket,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGINT or SIGTERM; requests that run then are finished, or told.

    Raises:
        BackendError: the model couldn't run any more.
    """
    engine = responder.engine
    app = make_app(responder, limits=options.limits, api_key=options.api_key)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=int(options.grace_seconds) + LAST_SECONDS,
    )
    server = _Server(config, engine, options.grace_seconds, on_ready)
    engine.on_failure = server.end
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        server.run(sockets=[listening])
    finally:
        sys.setswitchinterval(before)
        engine.stop()
        listening.close()
    if engine.failure:
        raise BackendError(engine.failure)


class _Server(uvicorn.Server):
    """Ends in two steps: nothing new, then what runs is told; a signal isn't raised again."""

    def __init__(
        self,
        config: uvicorn.Config,
        engine: Engine,
        grace_seconds: float,
        on_ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._engine, self._grace, self._on_ready = engine, grace_seconds, on_ready

    def end(self) -> None:
        """Stop as a signal would stop it."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.drain()
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._grace, self._engine.abort, SHUT_DOWN)
        await super().shutdown(sockets)
        timer.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals for as long as it runs."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
