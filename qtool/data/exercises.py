"""What a model is adapted to: tokens, and which of them it is to learn to say.

A line of JSON is one of these: `text`, all of which is learned; `prompt` and `completion`, of which
the completion is; `messages`, a chat, of which the assistant's turns are. The rows of E2E NLG
(`mr`, `ref`) and WebNLG (`triples`, `lexs`) are read as they are published.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qtool.base import Tokenizer
from qtool.data.documents import Messages, document
from qtool.errors import DataError
from qtool.storage.jsonl import json_lines
from qtool.wording import quoted, reason

NOT_LEARNED = -100
"""Label of a token that isn't learned, as torch's cross entropy has it."""
SEPARATOR = " || "
"""Between triples of WebNLG, and before what is to be written: ours."""


@dataclass(frozen=True, slots=True)
class Exercise:
    """One text, and the stretches of it that are learned."""

    text: str
    learned: tuple[tuple[int, int], ...]
    """Of characters: from, to."""
    place: str
    is_chat: bool = False
    """A template wrote it, with all special tokens."""
    reply: str = ""
    """Of a chat, the last answer as it stands in the line, without what ends its turn."""

    @property
    def prompt(self) -> str:
        """What is given before the first stretch that is learned."""
        return self.text[: self.learned[0][0]]

    def teaches(self, character: int) -> bool:
        """Return whether a character is learned."""
        return any(first <= character < last for first, last in self.learned)


class Chat(NamedTuple):
    """A chat that no template has written yet."""

    content: Messages
    place: str


@dataclass(frozen=True, slots=True)
class Learned:
    """Tokens, and what each is to be predicted as."""

    tokens: Tensor  # (length,) int64
    labels: Tensor
    """(length,) int64: the token itself, or `NOT_LEARNED`."""
    lengths: tuple[int, ...] = ()
    """Of exercises that stand behind one another and mustn't see each other; empty: it is one."""


def read_exercises(path: Path, tokenizer: Tokenizer) -> Iterator[Exercise]:
    """Yield what the lines of a .jsonl file, maybe gzipped, are to teach.

    Raises:
        DataError: the file can't be read; a line is none of what is known, or is a chat that the
            model's template refuses or that has no turn of the assistant.
    """
    for found in _parts(path):
        if isinstance(found, Exercise):
            yield found
        else:
            yield _chat_exercise(found.content, found.place, tokenizer)


def check_exercises(path: Path, *, prompts: bool = False) -> None:
    """Refuse a file that teaches nothing, as far as that is known without a model's tokenizer.

    Args:
        path: As for `read_exercises`.
        prompts: Something must be given in one of the lines, not just learned.

    Raises:
        DataError: as `read_exercises`; or there is nothing to learn, or no prompt.
    """
    has_prompt = [isinstance(one, Chat) or bool(one.prompt) for one in _parts(path)]
    if prompts and not any(has_prompt):
        raise no_prompts(path)
    if not has_prompt:
        raise DataError(f"{path} has nothing to learn from. Give lines as docs/adapters.md says.")


def no_prompts(path: Path) -> DataError:
    """Return what is wrong with a file in which nothing can be answered."""
    ways = "Give lines with 'prompt' and 'completion', or with 'messages'."
    return DataError(f"{path} has no prompts to write after. {ways}")


def _parts(path: Path) -> Iterator["Exercise | Chat"]:
    """Yield what the lines of a file hold, chats as they stand there."""
    for place, row in json_lines(path):
        values = row if isinstance(row, Mapping) else {}
        for prompt, completion in _pairs(values, place):
            text = prompt + completion
            yield Exercise(text, ((len(prompt), len(text)),), place)
        if not PAIRS.keys().isdisjoint(values) and not isinstance(values.get("text"), str):
            continue
        content = document(row, place).content
        if not isinstance(content, str):
            yield Chat(content, place)
        elif content:
            yield Exercise(content, ((0, len(content)),), place)


PAIRS = {"prompt": "completion", "mr": "ref", "triples": "lexs"}
"""What is given, and what is learned."""


def _pairs(row: Mapping[str, Any], place: str) -> Iterator[tuple[str, str]]:
    """Yield prompts and completions of a row; none if it has something else."""
    given = next((key for key in PAIRS if key in row), None)
    if given is None or isinstance(row.get("text"), str):
        return
    wanted = row.get(PAIRS[given])
    if given == "triples":
        yield from _described(row[given], wanted, place)
        return
    if not isinstance(row[given], str) or not isinstance(wanted, str) or not wanted:
        raise DataError(
            f"{place} has {quoted(given)}, and must have it and {quoted(PAIRS[given])} as strings, "
            "the second not empty."
        )
    if given == "mr":
        yield row[given] + SEPARATOR.rstrip(), f" {wanted}"
    else:
        yield row[given], wanted


def _described(triples: object, texts: object, place: str) -> Iterator[tuple[str, str]]:
    """Yield the facts of a row of WebNLG with each of the texts that say them."""
    if not (isinstance(triples, list) and triples and isinstance(texts, list) and texts):
        raise DataError(f"{place} has 'triples', and must have it and 'lexs' as lists with items.")
    if not all(isinstance(fact, list) and len(fact) == 3 for fact in triples):  # noqa: PLR2004
        raise DataError(f"{place}: each of 'triples' must be [subject, property, object].")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"{place}: each of 'lexs' must be a string with something in it.")
    facts = SEPARATOR.join(" : ".join(map(str, fact)) for fact in triples)
    for text in texts:
        yield facts + SEPARATOR.rstrip(), f" {text}"


def _chat_exercise(
    messages: Sequence[Mapping[str, Any]], place: str, tokenizer: Tokenizer
) -> Exercise:
    """Return a chat as the template writes it; what it adds for each answer is learned."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{place} is a chat, and the model's tokenizer has no chat template. Give lines with "
            "'prompt' and 'completion', or a model that was tuned for chats."
        )
    turns = [{**turn, "content": turn.get("content") or ""} for turn in messages]
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise DataError(f"{place} has no turn of the assistant: there is nothing to learn from it.")
    whole = _written(tokenizer, turns[: answers[-1] + 1], place)
    learned = []
    for number in answers:
        before = _written(tokenizer, turns[:number], place, asks=True) if number else ""
        after = _written(tokenizer, turns[: number + 1], place)
        if not (whole.startswith(after) and after.startswith(before)):
            raise DataError(
                f"{place}: the model's chat template writes earlier turns otherwise once later "
                "ones follow, so it isn't known which tokens are the assistant's. Give "
                "'prompt' and 'completion' instead."
            )
        learned.append((len(before), len(after)))
    said = turns[answers[-1]]["content"]
    reply = said if isinstance(said, str) else ""
    return Exercise(whole, tuple(learned), place, is_chat=True, reply=reply)


def _written(
    tokenizer: Tokenizer, turns: Sequence[Mapping[str, Any]], place: str, *, asks: bool = False
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=asks)
        )
    except Exception as error:  # a template is a program and raises what it likes
        raise DataError(
            f"{place}: the model's chat template refuses it: {reason(error)}."
        ) from error


def tokenized(tokenizer: Tokenizer, exercise: Exercise, end: int | None) -> Learned:
    """Return the tokens of an exercise; a text or completion ends with `end`, which is learned.

    A token that begins in a stretch that is learned is learned.

    Args:
        tokenizer: Of the model.
        exercise: What is learned.
        end: The token that the model stops writing at; None: it has none.

    Raises:
        DataError: the tokenizer can't say where its tokens begin.
    """
    if not tokenizer.is_fast:
        raise DataError(
            "The model's tokenizer doesn't say where its tokens begin. Give it a tokenizer.json: "
            "`AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL)` writes one."
        )
    found = tokenizer(
        exercise.text,
        add_special_tokens=not exercise.is_chat,
        return_offsets_mapping=True,
        truncation=False,
        verbose=False,
    )
    tokens, begins = list(found["input_ids"]), found["offset_mapping"]
    labels = [
        token if end and exercise.teaches(begin) else NOT_LEARNED
        for token, (begin, end) in zip(tokens, begins, strict=True)
    ]
    if not exercise.is_chat and end is not None and (not tokens or tokens[-1] != end):
        tokens.append(end)
        labels.append(end)
    return Learned(torch.tensor(tokens), torch.tensor(labels))


def cut_to(pieces: Sequence[Learned], length: int) -> list[Learned]:
    """Return what fits: longer ones in pieces of `length`; without those that teach nothing."""
    cut = (
        Learned(tokens, labels)
        for piece in pieces
        for tokens, labels in zip(
            piece.tokens.split(length), piece.labels.split(length), strict=True
        )
    )
    return [piece for piece in cut if bool((piece.labels[1:] != NOT_LEARNED).any())]


def in_packed_rows(pieces: Sequence[Learned], length: int) -> list[Learned]:
    """Return exercises behind one another in rows of at most `length` tokens, the longest first.

    Each goes into the first row that has room for it. Nothing is asked of the first token of one:
    what comes before it is another's.
    """
    order = sorted(range(len(pieces)), key=lambda index: -len(pieces[index].tokens))
    rows, room = list[list[Learned]](), list[int]()
    for piece in (pieces[index] for index in order):
        size = len(piece.tokens)
        row = next((n for n, free in enumerate(room) if free >= size), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(piece)
        room[row] -= size
    return [_row(row) for row in rows]


def _row(pieces: Sequence[Learned]) -> Learned:
    nothing = torch.tensor([NOT_LEARNED])
    labels = torch.cat([torch.cat([nothing, piece.labels[1:]]) for piece in pieces])
    tokens = torch.cat([piece.tokens for piece in pieces])
    return Learned(tokens, labels, tuple(len(piece.tokens) for piece in pieces))


def owners(pieces: Sequence[Learned], length: int) -> Tensor:
    """Return which exercise of its row each token belongs to, (pieces, length) int64.

    What fills a row up is one of its own.
    """
    found = torch.zeros(len(pieces), length, dtype=torch.int64)
    for row, piece in enumerate(pieces):
        sizes = torch.tensor(piece.lengths or (len(piece.tokens),))
        numbers = torch.arange(1, len(sizes) + 1).repeat_interleave(sizes)
        found[row, : len(numbers)] = numbers
    return found


def padded(pieces: Sequence[Learned], length: int, filler: int) -> tuple[Tensor, Tensor]:
    """Return tokens and labels, each (pieces, length) int64, filled up on the right.

    Causal models see nothing of what follows, so no mask is needed.
    """
    tokens = torch.full((len(pieces), length), filler)
    labels = torch.full((len(pieces), length), NOT_LEARNED)
    for row, piece in enumerate(pieces):
        tokens[row, : len(piece.tokens)] = piece.tokens
        labels[row, : len(piece.labels)] = piece.labels
    return tokens, labels
