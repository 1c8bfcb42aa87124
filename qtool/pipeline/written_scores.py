"""What a model writes after prompts, compared with what people wrote: BLEU, NIST and ROUGE.

BLEU is sacrebleu's (Post 2018), cased, tokenized as `13a`, over the whole corpus; NIST is nltk's on
the same tokens; ROUGE is the F-measure of rouge-score, the best reference of each prompt, averaged.
"""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qtool.base import Emit, Progress, Tokenizer
from qtool.data.corpora import check_tokens
from qtool.data.exercises import Exercise, no_prompts, read_exercises
from qtool.data.windows import positions_of
from qtool.errors import DataError, MissingExtraError
from qtool.modeling.load import LoadedModel
from qtool.modeling.own_words import written_as_asked
from qtool.wording import quoted

WRITING_BATCH = 32
"""Prompts that are answered at a time."""
ROUGES = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and all that is known to be right after it."""

    prompt: str
    references: tuple[str, ...]
    is_chat: bool
    """The prompt has its special tokens already."""


@dataclass(frozen=True, slots=True)
class WrittenScores:
    """How near what was written is to the references, each from 0 to 100 but NIST."""

    bleu: float
    nist: float | None
    """None: texts are too short for it."""
    rouge1: float
    rouge2: float
    rouge_l: float
    prompts: int
    references: int
    written_tokens: int
    """Of all answers, ends included."""


def read_questions(path: Path, tokenizer: Tokenizer, limit: int | None = None) -> list[Question]:
    """Return the prompts of a file in their order, each once, with all of its references.

    Of a chat the last answer is asked for. Texts without a prompt have none.

    Args:
        path: As `data.exercises` reads it.
        tokenizer: Of the model: writes chats.
        limit: The first prompts only.

    Raises:
        DataError: as `data.exercises`, or there is none.
    """
    found: dict[tuple[str, bool], list[str]] = {}
    for exercise in read_exercises(path, tokenizer):
        prompt, reference = _last(exercise)
        if not prompt:
            continue
        if len(found) == limit and (prompt, exercise.is_chat) not in found:
            continue
        found.setdefault((prompt, exercise.is_chat), []).append(reference)
    if not found:
        raise no_prompts(path)
    return [Question(text, tuple(refs), is_chat) for (text, is_chat), refs in found.items()]


def _last(exercise: Exercise) -> tuple[str, str]:
    """Return what comes before the last stretch that is learned, and that without its end."""
    first, last = exercise.learned[-1]
    return exercise.text[:first], exercise.reply or exercise.text[first:last]


@torch.no_grad()
def write_answers(
    model: LoadedModel, questions: Sequence[Question], max_tokens: int, emit: Emit
) -> tuple[list[str], int]:
    """Return what a model writes after each prompt by greedy search, and how many tokens that is.

    Prompts of like length run together, filled up on the left; answers end with the positions.

    Raises:
        DataError: a prompt has no tokens, or none is left for an answer, or one is beyond the
            embedding.
    """
    tokenizer = model.tokenizer
    prompts = [_tokens(model, question) for question in questions]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    fillers = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    filler = next(token for token in fillers if token is not None)
    answers, count = [""] * len(prompts), 0
    stops = [*model.stop_ids] or None
    for first in range(0, len(order), WRITING_BATCH):
        chosen = order[first : first + WRITING_BATCH]
        width = len(prompts[chosen[-1]])
        ids = torch.full((len(chosen), width), filler)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, width - len(prompts[index]) :] = 1
        room = (positions_of(model.model.config) or width + max_tokens) - width
        with written_as_asked(model):
            found = model.model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=min(max_tokens, room),
                do_sample=False,
                pad_token_id=filler,
                eos_token_id=stops,
            )
        written = found[:, width:].cpu()
        for row, index in enumerate(chosen):
            answer = _until_stop(written[row].tolist(), stops or [])
            answers[index] = tokenizer.decode(answer, skip_special_tokens=True)
            count += len(answer)
        emit(Progress("write", first + len(chosen), len(order)))
    return answers, count


def _until_stop(written: list[int], stops: Collection[int]) -> list[int]:
    """Return an answer with the token that ends it; what fills it up may be the same."""
    ends = (place for place, token in enumerate(written) if token in stops)
    return written[: next(ends, len(written)) + 1]


def _tokens(model: LoadedModel, question: Question) -> list[int]:
    found = model.tokenizer(
        question.prompt,
        add_special_tokens=not question.is_chat,
        truncation=False,
        verbose=False,
    )
    tokens = list(found["input_ids"])
    shown_prompt, limit = quoted(question.prompt), positions_of(model.model.config)
    if not tokens:
        raise DataError(f"The prompt {shown_prompt} has no tokens to write after. Leave it out.")
    if limit is not None and len(tokens) >= limit:
        raise DataError(
            f"The prompt {shown_prompt} has {len(tokens)} tokens, and {model.name} has {limit} "
            "positions, those of the answer included. Leave it out, or shorten it."
        )
    rows = model.model.config.get_text_config().vocab_size
    check_tokens(torch.tensor(tokens), rows, f"The prompt {shown_prompt}")
    return tokens


def score_answers(
    answers: Sequence[str], questions: Sequence[Question], written_tokens: int
) -> WrittenScores:
    """Compare answers with the references of their questions.

    Raises:
        MissingExtraError: sacrebleu or rouge-score isn't installed.
    """
    try:
        import sacrebleu  # slow, and extras
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise MissingExtraError("BLEU and ROUGE", "eval") from None
    texts = [answer.strip() for answer in answers]
    references = [[one.strip() for one in question.references] for question in questions]
    most = max(map(len, references))
    streams = [[refs[n] if n < len(refs) else None for refs in references] for n in range(most)]
    scorer = RougeScorer(list(ROUGES), use_stemmer=True)
    rouge = [
        sum(_best(scorer, text, refs, name) for text, refs in zip(texts, references, strict=True))
        for name in ROUGES
    ]
    return WrittenScores(
        bleu=float(sacrebleu.corpus_bleu(texts, streams).score),
        nist=_nist(texts, references),
        **dict(
            zip(
                ("rouge1", "rouge2", "rouge_l"),
                (100 * total / len(texts) for total in rouge),
                strict=True,
            )
        ),
        prompts=len(questions),
        references=sum(map(len, references)),
        written_tokens=written_tokens,
    )


def _best(scorer: object, text: str, references: Sequence[str], name: str) -> float:
    """Return the F-measure by the reference that is nearest."""
    found = (scorer.score(reference, text)[name].fmeasure for reference in references)  # type: ignore[attr-defined]
    return float(max(found))


def _nist(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float | None:
    """Return NIST (Doddington 2002); None: nothing is long enough, or nltk isn't installed."""
    try:
        from nltk.translate.nist_score import corpus_nist
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    except ImportError:
        return None
    cut = Tokenizer13a()
    tokens = [cut(text).split() for text in texts]
    known = [[cut(reference).split() for reference in refs] for refs in references]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(corpus_nist(known, tokens))
    except (ZeroDivisionError, ValueError):
        return None
