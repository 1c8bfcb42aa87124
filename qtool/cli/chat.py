"""`qtool chat`."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.cli import early
from qtool.cli.options import (
    AdapterOption,
    BackendOption,
    DeviceOption,
    KvCacheOption,
    ModelArgument,
    checked_seed,
)
from qtool.cli.outcome import print_error
from qtool.cli.progress import progress
from qtool.errors import ModelError

if TYPE_CHECKING:
    from qtool.serving.conversation import Conversation

HELP = "/reset forgets what was said, /quit ends; Ctrl-C stops an answer."
PROMPT = "> "


def chat(
    out_dir: ModelArgument,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of an answer; default: what fits.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Tokens of the whole conversation.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="0: always the likeliest token.")
    ] = 0.7,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1, help="Only tokens that together are this likely.")
    ] = 0.95,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            callback=checked_seed,
            help="The same answers each time; default: others.",
        ),
    ] = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
    kv_cache: KvCacheOption = None,
) -> None:
    """Talk with a model in the terminal, or send it the lines of a pipe.

    [bold]Examples[/bold]

      qtool chat OUT_DIR

      qtool chat OUT_DIR --system "Answer in one sentence." --temperature 0
    """
    early.check_backend(backend)
    with contextlib.ExitStack() as stack:
        with progress() as emit:
            (where,) = stack.enter_context(early.opened([out_dir], device, emit, adapter))
            from qtool import pipeline
            from qtool.serving.tokens import SamplingOptions

            options = pipeline.ChatOptions(
                sampling=SamplingOptions(temperature=temperature, top_p=top_p, seed=seed),
                system=system,
                max_tokens=max_tokens,
                max_length=max_model_len,
                backend=backend,
                kv_cache=kv_cache,
            )
            conversation = stack.enter_context(pipeline.chat(where, options, emit=emit))
        _talk(conversation)


def _talk(conversation: "Conversation") -> None:
    """Answer line by line."""
    for line in _lines():
        text = line.strip()
        if text == "/quit":
            return
        if text == "/reset":
            conversation.reset()
        elif text.startswith("/"):
            print(HELP, file=sys.stderr)
        elif text:
            try:
                _answer(conversation, text)
            except ModelError as error:
                print_error(str(error))


def _lines() -> Iterator[str]:
    """Yield what is typed, or the lines of a pipe."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - lines can be edited
    print(HELP, file=sys.stderr)
    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            print()
            return


def _answer(conversation: "Conversation", text: str) -> None:
    with _stopped_by_interrupt(conversation):
        for piece in conversation.answer(text):
            print(piece, end="", flush=True)
    print(flush=True)
    speed = conversation.speed
    if speed is not None:
        rate = f"{speed.tokens_per_second:.1f} tokens/s"
        first = f"the first after {speed.first_seconds:.2f} s"
        print(f"[{speed.tokens} tokens, {rate}, {first}]", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _stopped_by_interrupt(conversation: "Conversation") -> Iterator[None]:
    """Let Ctrl-C end the answer; a second one ends the command."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        conversation.stop()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
