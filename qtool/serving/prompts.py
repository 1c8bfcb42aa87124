"""From what a request says to the tokens that are continued."""

import copy
import threading
from collections.abc import Mapping, Sequence

from qtool.base import Tokenizer
from qtool.serving.bodies import ChatBody, CompletionBody, Message
from qtool.serving.refusals import RefusalError
from qtool.storage.plain_json import HALF
from qtool.wording import reason

BAD_REQUEST = 400
AS_SYSTEM = {"developer": "system"}
"""Roles that templates know by another name."""
NO_TEMPLATE = (
    "{name} has no chat template: its tokenizer doesn't say how a conversation is written. Add "
    "chat_template.jinja to the model's directory, or have plain text continued, by "
    "/v1/completions of `qtool serve`."
)


class PromptReader:
    """Makes tokens; has a tokenizer of its own, which one thread at a time uses."""

    def __init__(self, tokenizer: Tokenizer, name: str, vocab_size: int) -> None:
        self._tokenizer, self._lock = copy.deepcopy(tokenizer), threading.Lock()
        self._name, self._vocab_size = name, vocab_size

    def completions(self, body: CompletionBody) -> list[list[int]]:
        """Return the tokens of each prompt.

        Raises:
            RefusalError: there is none, or it isn't text.
        """
        prompts = body.prompt
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]  # type: ignore[assignment]
        return [self._one(prompt) for prompt in prompts]  # type: ignore[arg-type]

    def chat(self, body: ChatBody) -> list[list[int]]:
        """Return the tokens of a conversation, up to where its answer begins.

        Raises:
            RefusalError: the tokenizer has no template, or the template doesn't take it.
        """
        return [self.conversation(list(map(_as_template_has_it, body.messages)))]

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the tokens of messages, up to where the next answer begins.

        Raises:
            RefusalError: as `chat`.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            message = NO_TEMPLATE.format(name=self._name)
            raise RefusalError(BAD_REQUEST, message, param="messages", code="no_chat_template")
        try:
            with self._lock:
                text = self._tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=True
                )
        except Exception as error:  # templates are programs, and raise what they like
            raise RefusalError(
                BAD_REQUEST,
                f"The chat template of {self._name} doesn't take these messages: {reason(error)}.",
                param="messages",
            ) from error
        return self._encoded(text, "messages", special=False)

    def _one(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return self._encoded(prompt, "prompt", special=True)
        if not prompt:
            raise RefusalError(BAD_REQUEST, "A prompt has no tokens.", param="prompt")
        self._check(prompt, "prompt")
        return list(prompt)

    def _encoded(self, text: str, param: str, *, special: bool) -> list[int]:
        if HALF.search(text):
            message = "It has half of a surrogate pair, which is no character."
            raise RefusalError(BAD_REQUEST, message, param=param)
        with self._lock:
            ids = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        if not ids:
            raise RefusalError(
                BAD_REQUEST, "The prompt is empty: no token to continue.", param=param
            )
        self._check(ids, param)
        return list(ids)

    def _check(self, tokens: Sequence[int], param: str) -> None:
        """Refuse a token without a row in the embedding: on a card it would end the process."""
        if max(tokens) >= self._vocab_size:
            raise RefusalError(
                BAD_REQUEST,
                f"A prompt has token {max(tokens)}; the model has {self._vocab_size}.",
                param=param,
            )


def _as_template_has_it(message: Message) -> dict[str, str]:
    named = {"name": message.name} if message.name is not None else {}
    role = AS_SYSTEM.get(message.role, message.role)
    return {"role": role, "content": message.text, **named}
