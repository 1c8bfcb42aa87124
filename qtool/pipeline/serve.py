"""`serve`: a model behind OpenAI's API."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qtool.base import Emit, Progress, ignore_events
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.pipeline.imported import as_ours
from qtool.runtime.backends._choose import use_backend
from qtool.runtime.decode.cache import use_kv_cache
from qtool.serving.installed import check_servable
from qtool.serving.opening import DecoderOptions, open_decoder, served_model
from qtool.settings import KvCache

if TYPE_CHECKING:
    from qtool.serving.server import ServerOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How `serve` runs a model."""

    server: "ServerOptions"
    decoder: DecoderOptions = field(default_factory=DecoderOptions)
    max_requests: int = 128
    """Sequences that run or wait, at most."""
    backend: str | None = None
    """Runs the quantized layers; None: choose."""
    kv_cache: KvCache | None = None
    """How keys and values are kept; None: by $QTOOL_KV_CACHE, else as the model's activations."""


@dataclass(frozen=True, slots=True)
class Service:
    """A model that can be served."""

    name: str
    url: str
    """For clients, as their base URL."""
    slots: int
    """Sequences that run at a time."""
    max_length: int
    """Tokens of each, prompt and answer."""
    run: Callable[[Callable[[], None]], None]
    """Answers requests until a signal ends that; calls a function as soon as it does."""


@contextmanager
def serve(
    model: Location, options: ServeOptions, *, emit: Emit = ignore_events
) -> Iterator[Service]:
    """Load a model, and give what serves it.

    Raises:
        MissingExtraError: FastAPI or uvicorn isn't installed.
        OutputError: the port is taken.
        BackendError: the model doesn't fit; by `run`: it couldn't run any more.
    """
    check_servable()
    from qtool.serving.engine import Engine
    from qtool.serving.responder import Responder
    from qtool.serving.server import bound_socket, run_server

    executed = use_backend(options.backend), use_kv_cache(options.kv_cache)
    with bound_socket(options.server) as listening, executed[0], executed[1]:
        loaded = load_model(as_ours(model, emit))
        emit(Progress(f"preparing {loaded.name}"))
        decoder = open_decoder(loaded, options.decoder)
        decoder.prepare()
        engine = Engine(decoder, max_requests=options.max_requests)
        responder = Responder(served_model(loaded), engine)
        host, port = listening.getsockname()[:2]
        yield Service(
            name=loaded.name,
            url=f"http://{f'[{host}]' if ':' in host else host}:{port}/v1",
            slots=engine.slots,
            max_length=engine.max_length,
            run=lambda on_ready: run_server(responder, options.server, listening, on_ready),
        )
