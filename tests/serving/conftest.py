"""A server of the tiny model in this process, on a port of its own."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qtool import pipeline
from qtool.modeling.load import LoadedModel, load_model
from qtool.modeling.locate import Location
from qtool.serving.decoders import ForwardDecoder, SlotDecoder
from qtool.serving.opening import served_model
from tests.helpers import recipe

LENGTH, SLOTS = 256, 4


@dataclass(frozen=True)
class Running:
    """A server that runs."""

    port: int
    engine: Any
    server: Any
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


@pytest.fixture(scope="session")
def chat_checkpoint(chat_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny chat model in 4 bits; read only."""
    out_dir = tmp_path_factory.mktemp("served") / "tiny-chat"
    pipeline.quantize(Location(chat_llama), out_dir, recipe())
    return out_dir


@pytest.fixture(scope="session")
def loaded(chat_checkpoint: Path) -> LoadedModel:
    return load_model(Location(chat_checkpoint), device="cpu")


@pytest.fixture
def forward(loaded: LoadedModel) -> ForwardDecoder:
    return ForwardDecoder(loaded.model, max_length=LENGTH, slots=SLOTS)


Serve = Callable[..., Any]


@pytest.fixture(scope="session")
def serve(loaded: LoadedModel) -> Serve:
    """Return a context manager that serves a decoder, by default one of the tiny model."""
    pytest.importorskip("fastapi", reason="the extra `serve` isn't installed")
    pytest.importorskip("uvicorn", reason="the extra `serve` isn't installed")
    from qtool.serving import server as servers
    from qtool.serving.app import RequestLimits
    from qtool.serving.engine import Engine
    from qtool.serving.responder import Responder

    @contextmanager
    def serving(
        decoder: SlotDecoder | None = None,
        *,
        max_requests: int = 128,
        tokenizer: Any = None,
        limits: RequestLimits | None = None,
        **options: Any,
    ) -> Iterator[Running]:
        decoder = decoder or ForwardDecoder(loaded.model, max_length=LENGTH, slots=SLOTS)
        engine = Engine(decoder, max_requests=max_requests)
        model = served_model(loaded)
        if tokenizer is not None:
            model = type(model)(model.name, tokenizer, model.stop_ids, model.vocab_size)
        responder = Responder(model, engine)
        asked = servers.ServerOptions(port=0, limits=limits or RequestLimits(), **options)
        listening, ready, failed = servers.bound_socket(asked), threading.Event(), []

        def work() -> None:
            try:
                servers.run_server(responder, asked, listening, ready.set)
            except Exception as error:  # noqa: BLE001
                failed.append(error)

        port = listening.getsockname()[1]
        thread = threading.Thread(target=work)
        thread.start()
        try:
            assert ready.wait(30)
            yield Running(port, engine, failed, thread)
        finally:
            engine.on_failure()
            thread.join(30)
            assert not thread.is_alive()

    return serving


@pytest.fixture(scope="session")
def running(serve: Serve) -> Iterator[Running]:
    with serve() as server:
        yield server


@pytest.fixture(scope="session")
def client(running: Running) -> Iterator[Any]:
    """Return OpenAI's own client of the server."""
    openai = pytest.importorskip("openai", reason="the extra `dev` isn't installed")
    with openai.OpenAI(base_url=running.url, api_key="any", max_retries=0, timeout=60) as one:
        yield one
