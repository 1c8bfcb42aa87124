"""`dataset: model`: documents that the original writes itself, from its start and as chats.

What a model writes has the words and the special tokens that it will meet when it runs, whatever it
was trained on. Source: Liu et al. 2023 (LLM-QAT, arXiv 2305.17888).
"""

import itertools
import random
from collections.abc import Iterator, Sequence

import torch

from qtool.base import Emit, Progress
from qtool.data.corpora import WRITTEN_BY_THE_MODEL
from qtool.data.documents import Collection, Document
from qtool.data.special_tokens import document_ends
from qtool.data.windows import positions_of
from qtool.errors import DataError
from qtool.modeling.device import free_memory
from qtool.modeling.load import LoadedModel, load_model
from qtool.modeling.locate import Location
from qtool.modeling.own_words import written_as_asked
from qtool.modeling.source import ModelSource
from qtool.wording import reason

OPENINGS = (
    *("Write", "How", "What", "Explain", "Why", "Can you", "Give me", "I", "Please", "Tell me"),
    *("Is", "Describe", "Translate", "Summarize", "List", "My", "In", "Make", "Which", "Help me"),
)
"""First words of what users say; the model goes on."""
BATCH, MOST_AT_ONCE = 16, 4096
"""Documents that are written together: on a CPU, and at most on a card."""
SHARE_OF_ROOM = 0.4
"""Of a card's free memory, for keys, values and logits of what is written."""
MOST_QUESTION, MOST_DOCUMENT = 64, 480
"""Tokens of a user's turn, and of any other document."""
WRITTEN_BYTES = 32
"""Of a word of the vocabulary, per document: logits are sorted and summed in float32."""
USERS_TURN = "\ue000"
"""Is in no template: where it is rendered, a user's turn begins."""
MIN_P = 0.02
"""Of the likeliest word's chance: what is less likely isn't written, the tail is noise. Needs no
sorting of the vocabulary, which would take most of the time."""


def self_written(source: ModelSource, *, num_tokens: int, seed: int, emit: Emit) -> Collection:
    """Return documents of about so many tokens in all, half of them chats if it can.

    The model is loaded whole, on the device where it runs, and gone afterwards.

    Raises:
        QtoolError: it can't be loaded, or can't write.
    """
    generator = random.Random(seed)
    author = _Author(load_model(Location(source.directory)), generator, num_tokens)
    documents: list[Document] = []
    written = 0
    try:
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed)
            while written < num_tokens:
                emit(Progress("the model writes samples", written, num_tokens))
                documents += [*author.texts(), *author.chats()]
                written = max(author.written, written + author.batch)  # it may have nothing to say
    except RuntimeError as error:
        raise DataError(
            f"The model can't write samples: {reason(error)}. Name a text in place of 'model'."
        ) from error
    del author
    free_memory()
    generator.shuffle(documents)
    return Collection(WRITTEN_BY_THE_MODEL, {"written by": source.public_name}, iter(documents))


def _at_once(loaded: LoadedModel) -> int:
    """Return how many documents can be written together: for a few a step takes as long."""
    if loaded.device.type != "cuda":
        return BATCH
    text = loaded.model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    states = 2 * text.num_hidden_layers * heads * size * (2 * MOST_QUESTION + MOST_DOCUMENT)
    bytes_each = states * loaded.model.dtype.itemsize + WRITTEN_BYTES * text.vocab_size
    fit = int(SHARE_OF_ROOM * torch.cuda.mem_get_info(loaded.device)[0] / bytes_each)
    return min(max(BATCH, fit), MOST_AT_ONCE)


class _Author:
    """A model that writes, and how many tokens it has written."""

    def __init__(self, loaded: LoadedModel, generator: random.Random, num_tokens: int) -> None:
        self.loaded, self.tokenizer, self.generator = loaded, loaded.tokenizer, generator
        self.device, self.written = loaded.device, 0
        config = loaded.model.generation_config
        eos = config.eos_token_id if isinstance(config.eos_token_id, list) else []
        self.ends = [*dict.fromkeys([*document_ends(self.tokenizer), *eos])]
        self.positions = positions_of(loaded.model.config) or 1 << 20
        self.batch = min(_at_once(loaded), max(BATCH, num_tokens // MOST_DOCUMENT))

    def texts(self) -> Iterator[Document]:
        """Yield a batch of plain documents: what follows the start of a text."""
        start = self.tokenizer("", verbose=False)["input_ids"] or self.ends[-1:] or [0]
        for text in self._continued([start] * self.batch, MOST_DOCUMENT):
            yield Document(text, "a text by the model")

    def chats(self) -> Iterator[Document]:
        """Yield a batch of chats of two turns; none without a template that begins a turn."""
        if not self.tokenizer.chat_template:
            return
        before, mark, _ = self._rendered(USERS_TURN, prompt=False).partition(USERS_TURN)
        if not mark:
            return
        openings = self.generator.choices(OPENINGS, k=self.batch)
        begun = [self._ids(before + opening) for opening in openings]
        continued = self._continued(begun, MOST_QUESTION)
        questions = [f"{first}{rest}" for first, rest in zip(openings, continued, strict=True)]
        asked = [self._ids(self._rendered(question, prompt=True)) for question in questions]
        answers = self._continued(asked, MOST_DOCUMENT)
        for question, answer in zip(questions, answers, strict=True):
            turns = (("user", question), ("assistant", answer))
            messages = [{"role": role, "content": content.strip()} for role, content in turns]
            yield Document(messages, "a chat by the model")

    def _continued(self, prompts: Sequence[Sequence[int]], most: int) -> list[str]:
        """Return what the model writes after each prompt, without special tokens."""
        longest = max(map(len, prompts))
        pad = self.ends[0] if self.ends else 0
        padded = [[pad] * (longest - len(prompt)) + [*prompt] for prompt in prompts]
        real = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        with written_as_asked(self.loaded):
            tokens = self.loaded.model.generate(
                torch.tensor(padded, device=self.device),
                attention_mask=torch.tensor(real, device=self.device),
                max_new_tokens=max(1, min(most, self.positions - longest)),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                min_p=MIN_P,
                eos_token_id=self.ends or None,
                pad_token_id=pad,
            )
        rows = [
            list(itertools.takewhile(lambda token: token not in self.ends, row))
            for row in tokens[:, longest:].tolist()
        ]
        self.written += sum(map(len, rows))
        return list(self.tokenizer.batch_decode(rows, skip_special_tokens=True))

    def _rendered(self, question: str, *, prompt: bool) -> str:
        turns = [{"role": "user", "content": question}]
        template = self.tokenizer.apply_chat_template
        return str(template(turns, tokenize=False, add_generation_prompt=prompt))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
