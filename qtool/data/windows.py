"""A text as one stream of tokens, cut in windows: what perplexities are taken over."""

import torch
from torch import Tensor

from qtool.base import CausalModel, ModelConfig, Tokenizer
from qtool.data.corpora import Corpus, check_tokens, tokenize
from qtool.data.documents import Collection
from qtool.data.rendering import rendered
from qtool.errors import DataError

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""What families call it; some say it in no word."""


def positions_of(config: ModelConfig) -> int | None:
    """Return how many tokens a model was made to read; None: its configuration doesn't say."""
    found = (getattr(config.get_text_config(), key, None) for key in POSITIONS)
    return next((n for n in found if isinstance(n, int) and n > 0), None)


def windows_of(
    model: CausalModel,
    corpus: Corpus | Collection,
    context_length: int,
    max_windows: int | None,
) -> tuple[Tensor, int]:
    """Return the windows to evaluate, (windows, context_length) int64, and how many there are.

    Args:
        model: A loaded one: its tokenizer makes the tokens, its positions limit a window.
        corpus: The text; or chats, each as the model's template writes it, one after the other.
        context_length: Tokens per window.
        max_windows: Return the first windows only; None: all.

    Raises:
        DataError: the text is shorter than one window, or the model's context is, or a window
            predicts nothing; or the model has no embedding for a token, or no template for chats.
    """
    if context_length < 2 or (max_windows is not None and max_windows < 1):  # noqa: PLR2004
        raise DataError(
            f"The context length is {context_length} and the number of windows {max_windows}; "
            "a window needs at least 2 tokens, and a measurement at least 1 window."
        )
    config = model.model.config
    limit = positions_of(config)
    if limit is not None and context_length > limit:
        raise DataError(
            f"The context length is {context_length}, but {model.name} has {limit} positions. "
            f"Use --context-length {limit} or less."
        )
    stream = _stream(model.tokenizer, corpus)
    available = len(stream) // context_length
    if available == 0:
        raise DataError(
            f"{corpus.name} has {len(stream)} tokens, fewer than one window of {context_length}. "
            "Use a longer text or a shorter --context-length."
        )
    windows = stream[: available * context_length].view(available, context_length)[:max_windows]
    check_tokens(windows, config.get_text_config().vocab_size, corpus.name)
    return windows, available


def _stream(tokenizer: Tokenizer, corpus: Corpus | Collection) -> Tensor:
    if isinstance(corpus, Corpus):
        return tokenize(tokenizer, corpus.text)
    chats = (rendered(tokenizer, document, "chat") for document in corpus.documents)
    return torch.cat([torch.empty(0, dtype=torch.int64), *(chat.tokens for chat in chats)])
