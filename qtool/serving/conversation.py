"""One conversation in a terminal: a model, what was said, and the answer piece by piece."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from qtool.errors import ModelError
from qtool.serving.batch import Batch
from qtool.serving.decoders import SlotDecoder
from qtool.serving.prompts import PromptReader
from qtool.serving.refusals import RefusalError
from qtool.serving.served import ServedModel
from qtool.serving.text import Detokenizer, SequenceText, decoder_of
from qtool.serving.tokens import FailureEvent, SamplingOptions, TokenRequest


@dataclass(frozen=True, slots=True)
class Speed:
    """Of the last answer."""

    tokens: int
    first_seconds: float
    """Until its first token."""
    decode_seconds: float
    """From there to its last."""

    @property
    def tokens_per_second(self) -> float:
        """Return how fast it was written after its first token."""
        return (self.tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


class Conversation:
    """Remembers what was said; each answer reads all of it anew."""

    def __init__(
        self,
        model: ServedModel,
        decoder: SlotDecoder,
        sampling: SamplingOptions,
        *,
        max_tokens: int | None = None,
        system: str | None = None,
    ) -> None:
        """Begin.

        Raises:
            ModelError: the model has no chat template.
        """
        self._model, self._batch, self._sampling = model, Batch(decoder), sampling
        self._max_tokens, self._system, self._count = max_tokens, system, 0
        self._reader = PromptReader(model.tokenizer, model.name, model.vocab_size)
        self._decode = decoder_of(model.tokenizer)
        self.messages: list[dict[str, str]] = []
        self.speed: Speed | None = None
        self._stopped = False
        self.reset()
        self._tokens([*self.messages, {"role": "user", "content": "?"}])

    def reset(self) -> None:
        """Forget what was said, but for the system prompt."""
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        self.messages = system

    def stop(self) -> None:
        """End the answer that is being written after its next piece."""
        self._stopped = True

    def answer(self, text: str) -> Iterator[str]:
        """Yield an answer piece by piece, then remember it as far as it was written.

        Raises:
            ModelError: the conversation is too long, or the template doesn't take it.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._tokens(messages)
        room = self._batch.decoder.max_length - len(prompt)
        if room < 1:
            raise ModelError(
                f"The conversation has {len(prompt)} tokens, and there is room for "
                f"{self._batch.decoder.max_length}. /reset begins a new one."
            )
        self._stopped, written, self._count = False, [], self._count + 1
        most = min(self._max_tokens or room, room)
        request = TokenRequest(
            self._count, prompt, most, self._model.stop_ids, self._next_sampling()
        )
        try:
            for piece in self._pieces(request):
                written.append(piece)
                yield piece
        finally:
            self._batch.cancel(frozenset([self._count]))
            self.messages = [*messages, {"role": "assistant", "content": "".join(written)}]

    def _pieces(self, request: TokenRequest) -> Iterator[str]:
        text = SequenceText(Detokenizer(self._decode), (), keep_tokens=False)
        begin = first = time.monotonic()
        self._batch.add(request)
        while text.finish is None and not self._stopped:
            events = [e for e in self._batch.advance() if e.key == request.key]
            for event in events:
                if isinstance(event, FailureEvent):
                    raise ModelError(event.message)
            if not events:
                continue
            first = time.monotonic() if text.num_tokens == 0 else first
            yield text.add(events).text  # type: ignore[arg-type]
            self.speed = Speed(text.num_tokens, first - begin, time.monotonic() - first)

    def _next_sampling(self) -> SamplingOptions:
        """Return the options, with a seed of this answer's own."""
        seed = self._sampling.seed
        return self._sampling if seed is None else replace(self._sampling, seed=seed + self._count)

    def _tokens(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            return self._reader.conversation(messages)
        except RefusalError as refusal:
            raise ModelError(refusal.message) from refusal
