"""Special tokens: which separate documents, which inference will send, which the samples have.

Models lean on them: the first token and the markers of turns are where attention goes that has no
better place. What a solver never saw there it gets wrong by far more than the text around it.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from qtool.base import Tokenizer

DOCUMENT_ENDS = (
    *("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]"),
    *("<｜end▁of▁sentence｜>", "<|end▁of▁sentence|>"),  # noqa: RUF001 - as DeepSeek writes it
)
"""What models are pretrained to find between documents; a chat model often has another eos."""
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>|[!-\u0143]")
"""How tokenizers write a token that is one byte: SentencePiece, and byte-level BPE."""
PROBE = (
    {"role": "user", "content": "A"},
    {"role": "assistant", "content": "B"},
    {"role": "user", "content": "C"},
)


def document_ends(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens that end a document: eos, and what else the vocabulary has for it."""
    known = special_names(tokenizer)
    ends = [token for token, name in known.items() if name in DOCUMENT_ENDS]
    eos = tokenizer.eos_token_id
    return tuple(dict.fromkeys([*([] if eos is None else [eos]), *ends]))


def special_names(tokenizer: Tokenizer) -> Mapping[int, str]:
    """Return the name of each special token by its number."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    names = {token: str(one) for token, one in added.items() if one.special}
    for kind in ("bos", "eos"):
        token = getattr(tokenizer, f"{kind}_token_id", None)
        if token is not None:
            names.setdefault(token, str(getattr(tokenizer, f"{kind}_token", kind)))
    return dict(sorted(names.items()))


def protected_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that a model can't do without, however rare they are in its samples.

    They are the special ones, those that a chat template writes, and single bytes, of which all
    else can be made.
    """
    names = tokenizer.get_vocab().items()
    single = {token for name, token in names if BYTE.fullmatch(str(name))}
    return frozenset(special_names(tokenizer).keys() | _sent(tokenizer) | single)


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The special tokens that matter for a model, in its samples."""

    counts: Mapping[str, int]
    """How often each is there: bos, eos, what ends documents, what the chat template writes."""
    missing: tuple[str, ...]
    """Those that inference sends and no sample has."""

    def sentence(self) -> str:
        """Return the counts in words."""
        found = ", ".join(f"{name} {count}" for name, count in self.counts.items())
        return f"special tokens in the samples: {found or 'this model has none'}"

    def warning(self, name: str) -> str | None:
        """Return what to warn of; `name` is of the samples."""
        if not self.missing:
            return None
        return (
            f"No sample of {name} has {' or '.join(self.missing)}, which prompts of this model "
            "have: the result may be much worse there than elsewhere. Leave calibration.dataset "
            "out, or give calibration.mixture a source of chats."
        )


def count_special(tokenizer: Tokenizer, samples: Sequence[Tensor]) -> SpecialTokens:
    """Return how often the special tokens of a model are in its samples, each (length,) int64."""
    names, sent = special_names(tokenizer), _sent(tokenizer)
    present: Counter[int] = Counter()
    for sample in samples:
        values, counts = sample.unique(return_counts=True)
        present.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    ends = document_ends(tokenizer)
    asked = {tokenizer.bos_token_id, tokenizer.eos_token_id, *ends, *sent} & names.keys()
    return SpecialTokens(
        {names[token]: present[token] for token in sorted(asked)},
        tuple(names[token] for token in sorted(sent & names.keys()) if not present[token]),
    )


def _sent(tokenizer: Tokenizer) -> set[int]:
    """Return the tokens that inference sends around words: of a text, or of a chat if it can."""
    words = " ".join(turn["content"] for turn in PROBE)

    def ids(text: str, **options: bool) -> set[int]:
        return set(tokenizer(text, truncation=False, verbose=False, **options)["input_ids"])

    sent = ids(words)
    if getattr(tokenizer, "chat_template", None):
        with contextlib.suppress(Exception):  # a template is a program and raises what it likes
            chat = tokenizer.apply_chat_template(
                list(PROBE), tokenize=False, add_generation_prompt=True
            )
            sent |= ids(str(chat), add_special_tokens=False)
    return sent - ids(words, add_special_tokens=False)
