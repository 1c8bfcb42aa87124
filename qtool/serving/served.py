"""What a served model is, beside what runs it."""

from dataclasses import dataclass

from qtool.base import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Its name, and what its tokens mean."""

    name: str
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    """Tokens that end an answer."""
    vocab_size: int
