"""One thread owns the model and runs the batch; asyncio hands requests in and takes tokens out."""

import asyncio
import contextvars
import itertools
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qtool.serving.batch import Batch
from qtool.serving.decoders import SlotDecoder
from qtool.serving.tokens import Event, FailureEvent, TokenRequest

_LOG = logging.getLogger(__name__)
BROKEN = "The model can't run any more; the server stops. Its log says why."


class QueueFullError(Exception):
    """As many sequences wait as may."""


class EngineStoppedError(Exception):
    """Nothing new is taken."""


@dataclass(frozen=True, slots=True)
class Load:
    """What the engine has to do."""

    running: int
    waiting: int


class TokenStream:
    """Tokens of the sequences of one request, as they come; keys are their numbers from 0."""

    def __init__(self, engine: "Engine", number: int, count: int) -> None:
        self._engine, self.number, self.unfinished = engine, number, set(range(count))
        self._events: list[Event] = []
        self._ready = asyncio.Event()

    async def read(self) -> list[Event]:
        """Wait for events; return all that have come."""
        await self._ready.wait()
        self._ready.clear()
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Cancel what hasn't ended; call it in the end, always."""
        self._engine.forget(self)

    def stop(self, key: int) -> None:
        """Cancel one of the sequences."""
        if key in self.unfinished:
            self._engine.cancel([(self.number, key)])
            self.finished(key)

    def put(self, event: Event) -> None:
        """Take an event, unless its sequence was cancelled."""
        if event.key not in self.unfinished:
            return
        if isinstance(event, FailureEvent) or event.finish is not None:
            self.finished(event.key)
        self._events.append(event)
        self._ready.set()

    def finished(self, key: Hashable) -> None:
        """Count a sequence as ended."""
        self.unfinished.discard(key)
        self._engine.num_open -= 1


class Engine:
    """Runs sequences of any number of requests; all but the thread's own is for one event loop."""

    def __init__(
        self,
        decoder: SlotDecoder,
        *,
        max_requests: int,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """Set up.

        Args:
            decoder: Belongs to the engine's thread from `start` on.
            max_requests: Most sequences, running and waiting.
            on_failure: Called in the event loop when the model can't run any more.
        """
        self.max_requests, self.num_open, self.failure = max_requests, 0, ""
        self.slots, self.max_length = decoder.slots, decoder.max_length
        self._batch, self.on_failure = Batch(decoder), on_failure
        self._device = decoder.device
        self._commands: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._outbox: deque[Event] = deque()
        self._is_scheduled = False
        self._streams: dict[int, TokenStream] = {}
        self._numbers = itertools.count()
        self._takes = True
        self._loop: asyncio.AbstractEventLoop | None = None
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="qtool-engine")

    def start(self) -> None:
        """Begin to work; call it in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Return whether new requests are taken."""
        return self._takes and not self.failure

    @property
    def load(self) -> Load:
        """Return how much there is to do."""
        running = min(self._batch.num_running, self.num_open)
        return Load(running, self.num_open - running)

    def submit(self, requests: Sequence[TokenRequest]) -> TokenStream:
        """Let the sequences of a request be continued; their keys don't count.

        Raises:
            QueueFullError: too many are waiting.
            EngineStoppedError: the server is being shut down, or the model has failed.
        """
        if not self.is_ready:
            raise EngineStoppedError
        if self.num_open + len(requests) > self.max_requests:
            raise QueueFullError
        stream = TokenStream(self, next(self._numbers), len(requests))
        self._streams[stream.number] = stream
        self.num_open += len(requests)
        keyed = [replace(one, key=(stream.number, key)) for key, one in enumerate(requests)]
        self._commands.put(("add", keyed))
        return stream

    def cancel(self, keys: Sequence[tuple[int, int]]) -> None:
        """Let sequences end with the next step."""
        self._commands.put(("cancel", frozenset(keys)))

    def forget(self, stream: TokenStream) -> None:
        """Cancel what a request hasn't got, and know nothing of it any more."""
        if self._streams.pop(stream.number, None) is not None and stream.unfinished:
            self.cancel([(stream.number, key) for key in stream.unfinished])
            for key in tuple(stream.unfinished):
                stream.finished(key)

    def drain(self) -> None:
        """Take nothing new."""
        self._takes = False

    def abort(self, message: str) -> None:
        """Tell all requests that they won't be finished."""
        for stream in tuple(self._streams.values()):
            unfinished = tuple(stream.unfinished)
            self.cancel([(stream.number, key) for key in unfinished])
            for key in unfinished:
                stream.put(FailureEvent(key, message))

    def stop(self) -> None:
        """End the thread, as soon as its step is done, and wait for that."""
        self.drain()
        self._commands.put(("stop", None))
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        """Work until `stop`: this is the thread."""
        on_card = self._device.type == "cuda"
        try:
            with torch.cuda.device(self._device if on_card else -1), torch.no_grad():
                while self._obey():
                    self._deliver(self._batch.advance())
        except Exception:  # noqa: BLE001 - whatever it is, those who wait are told
            _LOG.exception("The model can't run any more")
            self.failure = BROKEN
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._fail)

    def _obey(self) -> bool:
        """Carry out commands, wait for one if there is nothing to do; False: the end."""
        while True:
            try:
                name, what = self._commands.get(block=self._batch.is_idle)
            except queue.Empty:
                return True
            if name == "stop":
                return False
            if name == "cancel":
                self._batch.cancel(what)
            else:
                for request in what:
                    self._batch.add(request)

    def _deliver(self, events: Sequence[Event]) -> None:
        self._outbox.extend(events)
        if events and not self._is_scheduled:
            self._is_scheduled = True
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._dispatch)

    def _dispatch(self) -> None:
        """Hand events to their streams, in the event loop."""
        self._is_scheduled = False
        while self._outbox:
            event = self._outbox.popleft()
            key: Any = event.key
            stream = self._streams.get(key[0])
            if stream is not None:
                stream.put(replace(event, key=key[1]))

    def _fail(self) -> None:
        self.abort(BROKEN)
        self.on_failure()
