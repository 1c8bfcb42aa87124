"""From a request's body to its answer: prompts in, tokens through the engine, text out."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from qtool.serving.answers import Answer, ShownTokens, TokenUsage, chat_answer, completion_answer
from qtool.serving.bodies import ChatBody, CompletionBody, GenerationBody
from qtool.serving.connection import (
    DEADLINE,
    TIMEOUT,
    EventStream,
    event_of,
    json_response,
    seconds_since,
    while_connected,
)
from qtool.serving.engine import Engine, EngineStoppedError, QueueFullError, TokenStream
from qtool.serving.prompts import BAD_REQUEST, PromptReader
from qtool.serving.refusals import NOT_FOUND, TOO_MANY, UNAVAILABLE, RefusalError
from qtool.serving.served import ServedModel
from qtool.serving.text import Detokenizer, SequenceText, TextPiece, decoder_of
from qtool.serving.tokens import FailureEvent, SamplingOptions, TokenEvent, TokenRequest

_LOG = logging.getLogger(__name__)
COMPLETION_TOKENS = 16
"""Of a completion that doesn't say how many, as OpenAI has it."""
LAST_EVENT = b"data: [DONE]\n\n"
Body = TypeVar("Body", bound=GenerationBody)


class Responder:
    """Answers requests for one model."""

    def __init__(self, model: ServedModel, engine: Engine) -> None:
        self.model, self.engine = model, engine
        self._reader = PromptReader(model.tokenizer, model.name, model.vocab_size)
        self._decode = decoder_of(model.tokenizer)

    async def complete(self, body: CompletionBody, request: Request) -> Response:
        """Answer /v1/completions.

        Raises:
            RefusalError: it can't be answered.
        """
        prompts = await self._prompts(body, self._reader.completions)
        most = body.max_tokens or COMPLETION_TOKENS
        wants = body.top_logprobs_wanted is not None
        answer = completion_answer(self.model.name, self.model.tokenizer, with_logprobs=wants)
        job = self._job(body, prompts, most, answer, prompts)
        return await self._respond(job, body, request)

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Answer /v1/chat/completions.

        Raises:
            RefusalError: it can't be answered.
        """
        prompts = await self._prompts(body, self._reader.chat)
        most = body.max_completion_tokens or body.max_tokens
        wants = body.top_logprobs_wanted is not None
        answer = chat_answer(self.model.name, self.model.tokenizer, with_logprobs=wants)
        job = self._job(body, prompts, most, answer, [()] * len(prompts))
        return await self._respond(job, body, request)

    async def _prompts(
        self, body: Body, read: Callable[[Body], list[list[int]]]
    ) -> list[list[int]]:
        if body.model not in (None, self.model.name):
            raise RefusalError(
                NOT_FOUND,
                f"The model {body.model!r} isn't served here. This server has {self.model.name!r}.",
                param="model",
                code="model_not_found",
            )
        return await asyncio.to_thread(read, body)

    def _job(
        self,
        body: CompletionBody | ChatBody,
        prompts: Sequence[Sequence[int]],
        most: int | None,
        answer: Answer,
        contexts: Sequence[Sequence[int]],
    ) -> "_Job":
        """Hand the sequences of a request to the engine."""
        choices = body.n or 1
        requests = [
            self._request(body, prompt, most, number)
            for prompt in prompts
            for number in range(choices)
        ]
        keeps = body.top_logprobs_wanted is not None
        texts = [
            SequenceText(Detokenizer(self._decode, context), body.stops, keep_tokens=keeps)
            for context in contexts
            for _ in range(choices)
        ]
        return _Job(self._submit(requests), texts, answer, sum(map(len, prompts)))

    def _request(
        self, body: CompletionBody | ChatBody, prompt: Sequence[int], most: int | None, number: int
    ) -> TokenRequest:
        room = self.engine.max_length - len(prompt)
        if room < max(1, most or 1):
            asked = f" and {most} for the answer" if most else ""
            raise RefusalError(
                BAD_REQUEST,
                f"This server's context has {self.engine.max_length} tokens, and the request wants "
                f"more: {len(prompt)} in the prompt{asked}. Shorten the prompt, or lower "
                "max_tokens.",
                param="messages" if isinstance(body, ChatBody) else "prompt",
                code="context_length_exceeded",
            )
        sampling = SamplingOptions(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=body.top_p or 1.0,
            seed=None if body.seed is None else body.seed + number,
            top_logprobs=body.top_logprobs_wanted,
        )
        return TokenRequest(number, prompt, most or room, self.model.stop_ids, sampling)

    def _submit(self, requests: Sequence[TokenRequest]) -> TokenStream:
        if len(requests) > self.engine.max_requests:
            message = f"This server takes {self.engine.max_requests} sequences at a time, not "
            raise RefusalError(BAD_REQUEST, f"{message}{len(requests)}.", param="n")
        try:
            return self.engine.submit(requests)
        except QueueFullError:
            raise RefusalError(
                TOO_MANY,
                f"The queue is full: {self.engine.max_requests} sequences run or wait. Try again "
                "later.",
                code="queue_full",
                headers={"Retry-After": "1"},
            ) from None
        except EngineStoppedError:
            message = self.engine.failure or "The server is being shut down."
            raise RefusalError(UNAVAILABLE, message, code="unavailable") from None

    async def _respond(
        self, job: "_Job", body: CompletionBody | ChatBody, request: Request
    ) -> Response:
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return EventStream(job.events(with_usage=usage), job.close)
        try:
            work = job.whole()
            return json_response(
                await while_connected(request.receive, work, request.scope[DEADLINE])
            )
        except TimeoutError:
            raise TIMEOUT from None
        finally:
            job.close()


class _Job:
    """The sequences of one request, on their way."""

    def __init__(
        self, stream: TokenStream, texts: list[SequenceText], answer: Answer, prompt_tokens: int
    ) -> None:
        self._stream, self._texts, self._answer = stream, texts, answer
        self._prompt_tokens, self._begin = prompt_tokens, time.monotonic()

    async def whole(self) -> dict[str, object]:
        """Return the answer, when all of it is there."""
        parts: list[list[TextPiece]] = [[] for _ in self._texts]
        async for index, piece in self._pieces():
            parts[index].append(piece)
        choices = []
        for index, pieces in enumerate(parts):
            tokens: ShownTokens = [pair for piece in pieces for pair in piece.tokens]
            finish = self._texts[index].finish
            assert finish is not None
            text = "".join(piece.text for piece in pieces)
            choices.append(self._answer.choice(index, text, tokens, finish))
        return self._answer.whole(choices, self._usage())

    async def events(self, *, with_usage: bool) -> AsyncIterator[bytes]:
        """Yield the events of a stream."""
        for index in range(len(self._texts)):
            opening = self._answer.opening(index)
            if opening is not None:
                yield self._event(opening, with_usage=with_usage)
        async for index, piece in self._pieces():
            if piece.text or piece.tokens or piece.finish:
                yield self._event(self._answer.chunk(index, piece), with_usage=with_usage)
        if with_usage:
            yield event_of(self._answer.event([], self._usage()))
        yield LAST_EVENT

    def close(self) -> None:
        """Cancel what isn't done, and log what was."""
        self._stream.close()
        usage, seconds = self._usage(), seconds_since(self._begin)
        ends = ",".join(text.finish or "cancelled" for text in self._texts)
        tokens = f"{usage.prompt_tokens}+{usage.completion_tokens}"
        _LOG.info("%s: %s tokens, %.2f s, %s", self._answer.id, tokens, seconds, ends)

    async def _pieces(self) -> AsyncIterator[tuple[int, TextPiece]]:
        while any(text.finish is None for text in self._texts):
            grouped: dict[int, list[TokenEvent]] = {}
            for event in await self._stream.read():
                if isinstance(event, FailureEvent):
                    raise RefusalError(UNAVAILABLE, event.message, code="unavailable")
                grouped.setdefault(event.key, []).append(event)  # type: ignore[arg-type]
            for index, events in grouped.items():
                text = self._texts[index]
                if text.finish is None:
                    yield index, text.add(events)
                if text.finish is not None:
                    self._stream.stop(index)

    def _event(self, choice: dict[str, object], *, with_usage: bool) -> bytes:
        body = self._answer.event([choice], None)
        return event_of({**body, "usage": None} if with_usage else body)

    def _usage(self) -> TokenUsage:
        return TokenUsage(self._prompt_tokens, sum(text.num_tokens for text in self._texts))
