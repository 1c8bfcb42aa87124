# ruff: noqa: ANN401, ARG002, FBT001, FBT002 - the signatures are those of lm-eval
"""A loaded model as lm-eval asks it: lm-eval's own Hugging Face class, plus a store of answers.

Imported only where lm-eval is installed.
"""

import contextlib
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from torch.nn.attention import SDPBackend, sdpa_kernel

from qtool.base import Emit, Notice, Progress, ignore_events
from qtool.errors import DataError, ModelError
from qtool.evaluation.kept import request_key
from qtool.evaluation.lm_eval import batches
from qtool.evaluation.lm_eval.options import AUTO, TaskOptions
from qtool.modeling.load import LoadedModel
from qtool.runtime.card_memory import cache_bytes
from qtool.storage.memo import Memo

TEXTS_AT_ONCE = 4096
WRITING_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All but cuDNN's, which is planned anew for every length: a text that is written has a new one at
every token, and waits 60 ms for each on an H100."""


class TaskModel(HFLM):  # type: ignore[misc] # lm-eval isn't typed
    """Answers lm-eval's requests with a model that is loaded already, and with what it answered."""

    batch_size_per_gpu: int | str

    def __init__(
        self, model: LoadedModel, options: TaskOptions, emit: Emit = ignore_events
    ) -> None:
        self._encoded: dict[str, array[int]] = {}
        super().__init__(
            pretrained=model.model,
            tokenizer=model.tokenizer,
            batch_size=options.batch_size,
            max_length=options.max_length,
        )
        self.name, self.emit = model.name, emit
        self._memory = batches.device_bytes(self.device)
        self._batch_scheduler = self._by_length()
        self.begin("", Memo())
        # What lm-eval asks of a CacheHook: it passes answers on as they come, after every batch.
        self.cache_hook = SimpleNamespace(add_partial=self._add)
        rows, words = model.model.config.get_text_config().vocab_size, len(model.tokenizer)
        if words > rows:
            self.warn(
                f"The tokenizer of {model.name} knows {words} tokens and its embedding has {rows} "
                "rows: a text with one of the others ends the run. Check that it is its own."
            )

    def warn(self, message: str) -> None:
        """Pass on a warning."""
        self.emit(Notice(message))

    def begin(self, task: str, store: Memo) -> None:
        """Answer for another task, with what `store` holds."""
        self.task, self.store, self.done, self.total = task, store, 0, 0
        self.truncated = 0
        """Requests of this task that are longer than the context, and are cut from the left."""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        """Return (log-likelihood, is it the greedy continuation) per request."""
        with self._encoded_ahead([request.args for request in requests]):
            return self._answer("loglikelihood", super().loglikelihood, requests)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the tokens of a text, looked up if it was encoded ahead."""
        known = self._encoded.get(string) if add_special_tokens is None and not kwargs else None
        if known is not None:
            return known.tolist()
        return super().tok_encode(string, add_special_tokens=add_special_tokens, **kwargs)

    @contextlib.contextmanager
    def _encoded_ahead(self, pairs: Sequence[tuple[str, str]]) -> Iterator[None]:
        """Encode all texts that lm-eval will, on all cores and each once.

        lm-eval encodes them one by one, and a question again with each of its answers: for mmlu on
        a card that takes longer than the model does.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            yield
            return
        texts = {context.rstrip() for context, _ in pairs} | {a + b for a, b in pairs if a}
        start = self.tokenizer.decode(self.prefix_token_id)
        plain = [text for text in sorted(texts) if text and not has_bos_prefix(text, start)]
        added = self.add_bos_token
        special = {} if added is None else {"add_special_tokens": added}
        for index in range(0, len(plain), TEXTS_AT_ONCE):
            part = plain[index : index + TEXTS_AT_ONCE]
            found = self.tokenizer(part, verbose=False, **special)["input_ids"]
            self._encoded |= {text: array("i", ids) for text, ids in zip(part, found, strict=True)}
        try:
            yield
        finally:
            self._encoded.clear()

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        """Return the log-likelihood of each whole text."""
        size = self.batch_size_per_gpu
        with self._in_batches_of(1 if size == AUTO else size):
            return self._answer("loglikelihood_rolling", super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        """Return a continuation per request, written by the decode runner where there is a card."""
        size = self.batch_size_per_gpu
        if size == AUTO:
            size = self._written_at_once([request.args for request in requests])
        with self._in_batches_of(size), sdpa_kernel(WRITING_ATTENTION):
            return self._answer("generate_until", super().generate_until, requests)

    def _written_at_once(self, arguments: Sequence[Any]) -> int:
        """Return how many texts are written at once."""
        settings = [self._generation(each) for each in arguments]
        lengths = (
            len(self.tok_encode(each[0])) + one["max_gen_toks"]
            for each, one in zip(arguments, settings, strict=True)
        )
        longest = min(self.max_length, max(lengths, default=1))
        beams = max((one.get("num_beams") or 1 for one in settings), default=1)
        size = beams * cache_bytes(self.config.get_text_config(), self.model.dtype)
        return batches.written_at_once(size, longest, self._memory)

    def _by_length(self) -> Callable[[int, Sequence[Any]], int]:
        """Return what sizes batches of requests, each (texts, prompt tokens, answer tokens).

        By its longest request; lm-eval would try what still fits in memory.
        """
        size = self.config.get_text_config().vocab_size * self.model.dtype.itemsize
        return batches.batches_by_length(
            batches.MOST_ON_CPU if self._memory is None else batches.MOST_READ,
            batches.tokens_read_at_once(size, self._memory),
            lambda request: min(self.max_length, len(request[1]) + len(request[2])),
        )

    def _in_batches_of(self, size: int | str) -> Any:
        return mock.patch.object(self, "batch_size_per_gpu", size)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **rest: Any) -> Any:
        """Without lm-eval's own progress bar, which rolling windows would show each."""
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, **rest)

    def _answer(
        self, kind: str, ask: Callable[..., list[Any]], requests: Sequence[Any]
    ) -> list[Any]:
        """Ask for what isn't known yet, in lm-eval's batches, and return all answers in order."""
        self.truncated += sum(self._is_cut(kind, request.args) for request in requests)
        self.total += len(requests)
        if kind == "generate_until" and any(
            self._generation(request.args)["do_sample"] for request in requests
        ):  # answers to one request differ, and are meant to: all are asked for, and none is kept
            with mock.patch.object(self, "store", Memo()):
                return ask(list(requests), disable_tqdm=True)
        keys = [request_key(kind, request.args) for request in requests]
        missing = [(k, r) for k, r in zip(keys, requests, strict=True) if k not in self.store]
        self.done += len(requests) - len(missing)
        answers = ask([request for _, request in missing], disable_tqdm=True) if missing else []
        for (key, _), answer in zip(missing, answers, strict=True):
            if key not in self.store:
                self.store.add(key, answer)
        return [self.store[key] for key in keys]

    def _generation(self, arguments: Any) -> Any:
        """Return how a request is to be continued: lm-eval's names, and its defaults."""
        return normalize_gen_kwargs(arguments[1], self.max_gen_toks)

    def _is_cut(self, kind: str, arguments: Any) -> bool:
        """Return whether lm-eval cuts a request; whole texts are split into windows instead."""
        if kind == "loglikelihood_rolling":
            return False
        if kind == "loglikelihood":
            text, room = "".join(arguments), self.max_length + 1
        else:
            text, longest = arguments[0], self._generation(arguments)["max_gen_toks"]
            room = self.max_length - longest
            if room < 1:
                raise DataError(
                    f"Task {self.task} lets a model write {longest} tokens, and {self.name} holds "
                    f"{self.max_length} with the prompt. Lower max_gen_toks in --gen-kwargs, raise "
                    "--max-length, or choose a model with a longer context."
                )
        # A token has a byte at least, so that most texts needn't be counted.
        return len(text.encode("utf-8", "surrogatepass")) >= room and (
            len(self.tok_encode(text)) > room
        )

    def _add(self, kind: str, arguments: Any, answer: Any) -> None:
        """Keep an answer that is a number: of choices, lm-eval would take a NaN for the best."""
        likelihood = answer[0] if kind == "loglikelihood" else answer
        if isinstance(likelihood, float) and math.isnan(likelihood):
            raise ModelError(
                f"{self.name} gives outputs that are not numbers, in task {self.task}. Try another "
                "dtype; if it stays, the weights are damaged."
            )
        self.store.add(request_key(kind, arguments), answer)
        self.done += 1
        self.emit(Progress(f"{self.task} of {self.name}", self.done, self.total))
