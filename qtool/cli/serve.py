"""`qtool serve`."""

import contextlib
import re
from pathlib import Path
from typing import Annotated

import typer

from qtool.base import Notice
from qtool.cli import console, early
from qtool.cli.options import (
    AdapterOption,
    BackendOption,
    DeviceOption,
    KvCacheOption,
    ModelArgument,
    in_panel,
)
from qtool.cli.progress import progress
from qtool.errors import DataError
from qtool.serving.installed import check_servable
from qtool.wording import reason

_of_limits = in_panel("Limits")
LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")
SERVES = (
    "Serving {0.name} at {0.url}: {0.slots} answers at a time, {0.max_length} tokens. Ctrl-C ends."
)
OPEN = (
    "It listens on {host} without --api-key: whoever reaches this machine can use the model. Give "
    "a key, or leave out --host."
)


def serve(
    out_dir: ModelArgument,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Ask clients for it; @FILE: what stands in a file."),
    ] = None,
    slots: Annotated[
        int | None,
        _of_limits(
            metavar="N",
            min=1,
            max=256,
            help="Answers written at a time; default: 16 by the decode runner of a card, else 4.",
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        _of_limits(
            metavar="N",
            min=2,
            help="Tokens of prompt and answer; default: 4096, or what the model has positions for.",
        ),
    ] = None,
    max_requests: Annotated[
        int, _of_limits(metavar="N", min=1, help="Answers that are written or wait; then 429.")
    ] = 128,
    request_timeout: Annotated[
        float, _of_limits(metavar="SECONDS", min=0.1, help="For a whole request; then 504.")
    ] = 600.0,
    max_body: Annotated[
        int, _of_limits(metavar="BYTES", min=1000, help="Of a request's body; then 413.")
    ] = 4 * 2**20,
    grace: Annotated[
        float, _of_limits(metavar="SECONDS", min=0, help="For running requests after Ctrl-C.")
    ] = 30.0,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
    kv_cache: KvCacheOption = None,
) -> None:
    """Serve a model by the API that OpenAI's clients speak.

    [bold]Examples[/bold]

      qtool serve OUT_DIR

      qtool serve OUT_DIR --port 8080 --max-model-len 8192
    """
    check_servable()
    key = _key(api_key)
    early.check_backend(backend)
    with contextlib.ExitStack() as stack:
        with progress() as emit:
            if key is None and host not in LOCAL_HOSTS:
                emit(Notice(OPEN.format(host=host)))
            (where,) = stack.enter_context(early.opened([out_dir], device, emit, adapter))
            from qtool import pipeline
            from qtool.serving.app import RequestLimits
            from qtool.serving.opening import DecoderOptions
            from qtool.serving.server import ServerOptions

            limits = RequestLimits(timeout_seconds=request_timeout, max_body_bytes=max_body)
            server = ServerOptions(
                host=host, port=port, api_key=key, limits=limits, grace_seconds=grace
            )
            options = pipeline.ServeOptions(
                server=server,
                decoder=DecoderOptions(slots=slots, max_length=max_model_len),
                max_requests=max_requests,
                backend=backend,
                kv_cache=kv_cache,
            )
            service = stack.enter_context(pipeline.serve(where, options, emit=emit))
        service.run(lambda: console.err.print(SERVES.format(service), markup=False, soft_wrap=True))


def _key(text: str | None) -> str | None:
    """Return the key that was given, or stands in the file that was."""
    if text is None:
        return None
    key = text
    if text.startswith("@"):
        try:
            key = Path(text[1:]).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise DataError(
                f"The key of --api-key can't be read from {text[1:]}: {reason(error)}."
            ) from error
        if not key:
            raise DataError(f"{text[1:]}, which --api-key names, is empty. Write the key into it.")
    if not re.fullmatch(r"[!-~]+", key):
        raise DataError(
            "--api-key has spaces or characters beyond ASCII, which clients can't send. Take "
            "letters, digits and punctuation."
        )
    return key
