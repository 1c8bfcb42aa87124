"""`chat`: a conversation with a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from qtool.base import Emit, Progress, ignore_events
from qtool.errors import ModelError
from qtool.modeling.load import load_model, load_tokenizer
from qtool.modeling.locate import Location
from qtool.pipeline.imported import as_ours
from qtool.runtime.backends._choose import use_backend
from qtool.runtime.decode.cache import use_kv_cache
from qtool.serving.conversation import Conversation
from qtool.serving.opening import DecoderOptions, open_decoder, served_model
from qtool.serving.prompts import NO_TEMPLATE
from qtool.serving.tokens import SamplingOptions
from qtool.settings import KvCache


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How `chat` answers."""

    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    system: str | None = None
    """What is said first, by nobody."""
    max_tokens: int | None = None
    """Of an answer; None: as many as there is room for."""
    max_length: int | None = None
    """Tokens of the conversation."""
    backend: str | None = None
    """Runs the quantized layers; None: choose."""
    kv_cache: KvCache | None = None
    """How keys and values are kept; None: by $QTOOL_KV_CACHE, else as the model's activations."""


@contextmanager
def chat(
    model: Location, options: ChatOptions = ChatOptions(), *, emit: Emit = ignore_events
) -> Iterator[Conversation]:
    """Load a model, and give a conversation with it.

    Raises:
        ModelError: it has no chat template.
        BackendError: it doesn't fit.
    """
    with use_backend(options.backend), use_kv_cache(options.kv_cache):
        model = as_ours(model, emit)
        if not load_tokenizer(model.directory).chat_template:
            raise ModelError(NO_TEMPLATE.format(name=model.name))
        loaded = load_model(model)
        emit(Progress(f"preparing {loaded.name}"))
        decoder = open_decoder(loaded, DecoderOptions(slots=1, max_length=options.max_length))
        decoder.prepare()
        yield Conversation(
            served_model(loaded),
            decoder,
            options.sampling,
            max_tokens=options.max_tokens,
            system=options.system,
        )
