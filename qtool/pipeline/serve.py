"""`serve`: a model behind OpenAI's API."""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from qtool.base import Emit, Progress, ignore_events
from qtool.modeling.load import LoadedModel
from qtool.modeling.locate import Location
from qtool.pipeline.shared_model import load_shared
from qtool.runtime.backends._choose import use_backend
from qtool.runtime.decode.cache import use_kv_cache
from qtool.runtime.tensor_parallel import launched
from qtool.serving.decoders import SlotDecoder
from qtool.serving.installed import check_servable
from qtool.serving.opening import DecoderOptions, open_decoder, served_model
from qtool.serving.shared_decoder import LeadingDecoder, follow
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

    Under `torchrun` ranks share it: rank 0 answers, the others only run their parts.

    Raises:
        MissingExtraError: FastAPI or uvicorn isn't installed.
        OutputError: the port is taken.
        BackendError: the model doesn't fit; by `run`: it couldn't run any more.
    """
    check_servable()
    from qtool.serving.server import bound_socket

    with ExitStack() as stack:
        group = stack.enter_context(launched())
        leads = group is None or group.leads
        listening = stack.enter_context(bound_socket(options.server)) if leads else None
        stack.enter_context(use_backend(options.backend))
        stack.enter_context(use_kv_cache(options.kv_cache))
        loaded = load_shared(model, group, emit)
        emit(Progress(f"preparing {loaded.name}"))
        decoder = open_decoder(loaded, options.decoder)
        decoder.prepare()
        if listening is None:
            assert group is not None
            run = partial(follow, decoder, group)
            yield Service(loaded.name, "", decoder.slots, decoder.max_length, lambda _: run())
        elif group is None:
            yield _service(loaded, decoder, options, listening)
        else:
            leading = LeadingDecoder(decoder, group)
            yield _service(loaded, leading, options, listening)
            leading.end()


def _service(
    loaded: LoadedModel, decoder: SlotDecoder, options: ServeOptions, listening: socket.socket
) -> Service:
    """Return what answers requests."""
    from qtool.serving.engine import Engine
    from qtool.serving.responder import Responder
    from qtool.serving.server import run_server

    engine = Engine(decoder, max_requests=options.max_requests)
    responder = Responder(served_model(loaded), engine)
    host, port = listening.getsockname()[:2]
    return Service(
        name=loaded.name,
        url=f"http://{f'[{host}]' if ':' in host else host}:{port}/v1",
        slots=engine.slots,
        max_length=engine.max_length,
        run=lambda on_ready: run_server(responder, options.server, listening, on_ready),
    )
